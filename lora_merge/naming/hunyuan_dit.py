"""The family of Hunyuan-DiT, in the names of its authors; those of diffusers are not known here."""

from __future__ import annotations

from .tables import Stack
from .transformer import transformer

_BLOCK = (
    "attn1.Wqkv attn1.q_norm attn1.k_norm attn1.out_proj attn2.q_proj attn2.kv_proj attn2.q_norm attn2.k_norm "
    "attn2.out_proj norm1 norm2 norm3 mlp.fc1 mlp.fc2 default_modulation.1 skip_norm skip_linear"
)
_OUTSIDE = (
    "mlp_t5.0 mlp_t5.2 pooler.k_proj pooler.q_proj pooler.v_proj pooler.c_proj x_embedder.proj t_embedder.mlp.0 "
    "t_embedder.mlp.2 extra_embedder.0 extra_embedder.2 style_embedder final_layer.linear final_layer.adaLN_modulation.1 "
    "text_embedding_padding pooler.positional_embedding"
)

FAMILY = transformer(
    "Hunyuan-DiT",
    stacks=(Stack(own="blocks", depth=40, whole=dict.fromkeys(_BLOCK.split(), "")),),
    outside=dict.fromkeys(_OUTSIDE.split(), ""),
    parameters=("text_embedding_padding", "pooler.positional_embedding"),
    own_read_as=("base_model.model.",),
)
