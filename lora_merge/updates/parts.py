"""Names of the parts of an update that are differences of whole weights."""

# Dense differences to a weight, a bias or a norm: additive, written by LyCORIS and ComfyUI's trainer.
DIFF_PARTS = ("diff", "diff_b", "w_norm", "b_norm")
BIAS_PARTS = ("diff_b", "b_norm")
# In the order in which a weight's difference is looked for.
WEIGHT_PARTS = ("diff", "w_norm")
