"""LCM inference in plain torch: which noise levels to visit, and the loop that visits them.

schedule     timesteps of an N-step run and their sigmas
times        times between picture and noise, for models that know every one (flow, continuous levels)
preset       what a few-step model asks of its sampler, and the levels this makes
presets      the settings of published few-step models, by name
consistency  boundary scalings c_skip, c_out of a consistency model
renoise      how a step returns to a noise level: the share of old and of fresh noise (gamma)
linear_step  one step, consistency function and re-noising together, as three weights
editing      change a picture by two prompts without inverting it (DDCM)
multistep    the sampling loop, k-diffusion's calling protocol
guidance     the embedding that tells a full LCM its guidance
attention_guidance  a negative prompt in attention, without a second model call (NAG)
shaped_noise  step noise limited, scaled, and evened out under a feathered mask
limits       x0 after guidance, kept within the range that it has without
noise        fresh noise that depends on seed, batch index and noise level only

Words used throughout. timestep: index of a training noise level, 0..999, integer. sigma: noise level, standard
deviation of the noise in a latent x = x0 + sigma * eps. table: the ascending sigmas of all training timesteps.
step: index in the sampling loop, 0 first. Nothing here knows ComfyUI; models, noise and progress bars are arguments.
"""
