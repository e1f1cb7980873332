"""Names and shapes of other libraries' models, which exports are checked against without them.

They are written after those libraries' models, not after our renaming, so that a slip in one shows
in the other. The tests compare both with the libraries themselves.

C width of a stage, M hidden width of its MLP, R rows of a position table, N heads, K classes.
"""

from simmim.backbone.build import Spec
from simmim.backbone.swin import SwinSpec
from simmim.backbone.swinv2 import SwinV2Spec
from simmim.backbone.vit import ViTSpec
from simmim.weights.timm_layout import family_of

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def shapes_of_model(layout: str, spec: Spec, kind: str, num_classes: int, masked: bool) -> Shapes:
    """Name and shape of every parameter of a library's model.

    Args:
        layout: "hf", "timm" or "mmpretrain".
        spec: the encoder's architecture.
        kind: "simmim", "classifier" or "encoder", as the library's model is.
        num_classes: K.
        masked: whether the encoder has a mask token.
    """
    assert isinstance(spec, SwinSpec | ViTSpec)
    if isinstance(spec, ViTSpec):
        timm = {"vit": _timm_vit, "beit": _timm_beit}[family_of(spec)]
        shapes = _hf_vit(spec, kind) if layout == "hf" else timm(spec, kind)
    else:
        makers = {"hf": _hf_swin, "timm": _timm_swin, "mmpretrain": _mmpretrain_swin}
        shapes = makers[layout](spec, kind)
    head = {"hf": "classifier", "mmpretrain": "head.fc"}.get(layout)
    head = head or ("head" if isinstance(spec, ViTSpec) else "head.fc")
    decoder = {"hf": "decoder.0", "mmpretrain": "neck.decoder.0"}.get(layout)
    features = _features(spec)
    if kind == "classifier":
        shapes |= {f"{head}.weight": (num_classes, features), f"{head}.bias": (num_classes,)}
    token = {
        "hf": f"{next(iter(shapes)).split('.')[0]}.embeddings.mask_token",
        "mmpretrain": "backbone.mask_token",
    }.get(layout)
    if masked and token is not None:
        shapes[token] = (1, 1, spec.embed_dim)
    if kind == "simmim" and decoder is not None:
        outputs = spec.channels * spec.stride**2
        shapes |= {f"{decoder}.weight": (outputs, features, 1, 1), f"{decoder}.bias": (outputs,)}
    return shapes


def _features(spec: SwinSpec | ViTSpec) -> int:
    if isinstance(spec, ViTSpec):
        return spec.embed_dim
    return spec.embed_dim << (len(spec.depths) - 1)


def norm(name: str, width: int) -> Shapes:
    """Names and shapes of a norm's gain and bias."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    """Names and shapes of a linear layer's weight and bias."""
    shapes: Shapes = {f"{name}.weight": (outputs, inputs)}
    return shapes | {f"{name}.bias": (outputs,)} if bias else shapes


def _patches(name: str, spec: SwinSpec | ViTSpec) -> Shapes:
    p = spec.patch_size
    return {
        f"{name}.weight": (spec.embed_dim, spec.channels, p, p),
        f"{name}.bias": (spec.embed_dim,),
    }


def _hf_swin(spec: SwinSpec, kind: str) -> Shapes:
    v2 = isinstance(spec, SwinV2Spec)
    model = "swinv2" if v2 else "swin"
    shapes = _patches(f"{model}.embeddings.patch_embeddings.projection", spec)
    shapes |= norm(f"{model}.embeddings.norm", spec.embed_dim)
    for i, depth in enumerate(spec.depths):
        C, N = spec.embed_dim << i, spec.num_heads[i]
        stage = f"{model}.encoder.layers.{i}"
        for j in range(depth):
            block = f"{stage}.blocks.{j}"
            attention = f"{block}.attention.self"
            for name in ("query", "key", "value"):
                bias = spec.qkv_bias and not (v2 and name == "key")
                shapes |= linear(f"{attention}.{name}", C, C, bias)
            if v2:
                shapes |= _v2_position(attention, "continuous_position_bias_mlp", N)
            else:
                rows = (2 * spec.window(i) - 1) ** 2
                shapes[f"{attention}.relative_position_bias_table"] = (rows, N)
            shapes |= linear(f"{block}.attention.output.dense", C, C)
            shapes |= norm(f"{block}.layernorm_before", C) | norm(f"{block}.layernorm_after", C)
            M = int(C * spec.mlp_ratio)
            shapes |= linear(f"{block}.intermediate.dense", C, M)
            shapes |= linear(f"{block}.output.dense", M, C)
        if i < len(spec.depths) - 1:
            shapes |= _merging(f"{stage}.downsample", C, v2)
    return shapes | norm(f"{model}.layernorm", _features(spec))


def _v2_position(attention: str, mlp: str, heads: int) -> Shapes:
    return {
        f"{attention}.logit_scale": (heads, 1, 1),
        f"{attention}.{mlp}.0.weight": (512, 2),
        f"{attention}.{mlp}.0.bias": (512,),
        f"{attention}.{mlp}.2.weight": (heads, 512),
    }


def _merging(name: str, width: int, v2: bool) -> Shapes:
    # SwinV2 reduces first, then norms
    shapes = linear(f"{name}.reduction", 4 * width, 2 * width, bias=False)
    return shapes | norm(f"{name}.norm", 2 * width if v2 else 4 * width)


def _timm_swin(spec: SwinSpec, kind: str) -> Shapes:
    v2 = isinstance(spec, SwinV2Spec)
    shapes = _patches("patch_embed.proj", spec) | norm("patch_embed.norm", spec.embed_dim)
    for i, depth in enumerate(spec.depths):
        C, N = spec.embed_dim << i, spec.num_heads[i]
        if i:
            shapes |= _merging(f"layers.{i}.downsample", C // 2, v2)
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            shapes |= linear(f"{block}.attn.qkv", C, 3 * C, spec.qkv_bias and not v2)
            if v2:
                shapes |= _v2_position(f"{block}.attn", "cpb_mlp", N)
                if spec.qkv_bias:
                    shapes |= {f"{block}.attn.q_bias": (C,), f"{block}.attn.v_bias": (C,)}
            else:
                rows = (2 * spec.window(i) - 1) ** 2
                shapes[f"{block}.attn.relative_position_bias_table"] = (rows, N)
            shapes |= linear(f"{block}.attn.proj", C, C)
            shapes |= norm(f"{block}.norm1", C) | norm(f"{block}.norm2", C)
            M = int(C * spec.mlp_ratio)
            shapes |= linear(f"{block}.mlp.fc1", C, M) | linear(f"{block}.mlp.fc2", M, C)
    return shapes | norm("norm", _features(spec))


def _mmpretrain_swin(spec: SwinSpec, kind: str) -> Shapes:
    shapes = _patches("backbone.patch_embed.projection", spec)
    shapes |= norm("backbone.patch_embed.norm", spec.embed_dim)
    if spec.absolute_position:
        tokens = spec.grid[0] * spec.grid[1]
        shapes["backbone.absolute_pos_embed"] = (1, tokens, spec.embed_dim)
    for i, depth in enumerate(spec.depths):
        C, N, w = spec.embed_dim << i, spec.num_heads[i], spec.window(i)
        stage = f"backbone.stages.{i}"
        for j in range(depth):
            block = f"{stage}.blocks.{j}"
            attention = f"{block}.attn.w_msa"
            shapes |= linear(f"{attention}.qkv", C, 3 * C, spec.qkv_bias)
            shapes |= linear(f"{attention}.proj", C, C)
            shapes[f"{attention}.relative_position_bias_table"] = ((2 * w - 1) ** 2, N)
            shapes[f"{attention}.relative_position_index"] = (w * w, w * w)
            shapes |= norm(f"{block}.norm1", C) | norm(f"{block}.norm2", C)
            M = int(C * spec.mlp_ratio)
            shapes |= linear(f"{block}.ffn.layers.0.0", C, M) | linear(
                f"{block}.ffn.layers.1", M, C
            )
        if i < len(spec.depths) - 1:
            shapes |= _merging(f"{stage}.downsample", C, v2=False)
    return shapes | norm(f"backbone.norm{len(spec.depths) - 1}", _features(spec))


def _table(spec: ViTSpec) -> Shape:
    h, w = spec.grid
    return ((2 * h - 1) * (2 * w - 1) + 3, spec.num_heads)


def _hf_vit(spec: ViTSpec, kind: str) -> Shapes:
    tables = spec.shared_relative_position or spec.layer_relative_position
    plain = not tables and spec.layer_scale is None and spec.absolute_position and spec.final_norm
    model, C, M = "vit" if plain else "beit", spec.embed_dim, int(spec.embed_dim * spec.mlp_ratio)
    embeddings = f"{model}.embeddings"
    shapes = _patches(f"{embeddings}.patch_embeddings.projection", spec)
    shapes[f"{embeddings}.cls_token"] = (1, 1, C)
    if spec.absolute_position:
        tokens = 1 + spec.grid[0] * spec.grid[1]
        shapes[f"{embeddings}.position_embeddings"] = (1, tokens, C)
    if spec.shared_relative_position:
        name = f"{model}.encoder.relative_position_bias.relative_position_bias_table"
        shapes[name] = _table(spec)
    for i in range(spec.depth):
        block = f"{model}.encoder.layer.{i}"
        attention = f"{block}.attention.attention"
        for name in ("query", "key", "value"):
            bias = spec.qkv_bias and not (model == "beit" and name == "key")
            shapes |= linear(f"{attention}.{name}", C, C, bias)
        if spec.layer_relative_position:
            name = f"{attention}.relative_position_bias.relative_position_bias_table"
            shapes[name] = _table(spec)
        shapes |= linear(f"{block}.attention.output.dense", C, C)
        shapes |= linear(f"{block}.intermediate.dense", C, M) | linear(
            f"{block}.output.dense", M, C
        )
        shapes |= norm(f"{block}.layernorm_before", C) | norm(f"{block}.layernorm_after", C)
        if spec.layer_scale is not None:
            shapes |= {f"{block}.lambda_1": (C,), f"{block}.lambda_2": (C,)}
    return shapes | norm(
        f"{model}.layernorm" if spec.final_norm else f"{model}.pooler.layernorm", C
    )


def _timm_beit(spec: ViTSpec, kind: str) -> Shapes:
    C, M = spec.embed_dim, int(spec.embed_dim * spec.mlp_ratio)
    shapes = _patches("patch_embed.proj", spec)
    shapes["cls_token"] = (1, 1, C)
    if spec.absolute_position:
        shapes["pos_embed"] = (1, 1 + spec.grid[0] * spec.grid[1], C)
    if spec.shared_relative_position:
        shapes["rel_pos_bias.relative_position_bias_table"] = _table(spec)
    for i in range(spec.depth):
        block = f"blocks.{i}"
        shapes |= linear(f"{block}.attn.qkv", C, 3 * C, bias=False)
        if spec.qkv_bias:
            shapes |= {f"{block}.attn.q_bias": (C,), f"{block}.attn.v_bias": (C,)}
        if spec.layer_relative_position:
            shapes[f"{block}.attn.relative_position_bias_table"] = _table(spec)
        shapes |= linear(f"{block}.attn.proj", C, C)
        shapes |= norm(f"{block}.norm1", C) | norm(f"{block}.norm2", C)
        shapes |= linear(f"{block}.mlp.fc1", C, M) | linear(f"{block}.mlp.fc2", M, C)
        if spec.layer_scale is not None:
            shapes |= {f"{block}.gamma_1": (C,), f"{block}.gamma_2": (C,)}
    return shapes | norm("norm" if spec.final_norm else "fc_norm", C)


def _timm_vit(spec: ViTSpec, kind: str) -> Shapes:
    C, M = spec.embed_dim, int(spec.embed_dim * spec.mlp_ratio)
    shapes = _patches("patch_embed.proj", spec)
    shapes |= {"cls_token": (1, 1, C), "pos_embed": (1, 1 + spec.grid[0] * spec.grid[1], C)}
    for i in range(spec.depth):
        block = f"blocks.{i}"
        shapes |= norm(f"{block}.norm1", C) | norm(f"{block}.norm2", C)
        shapes |= linear(f"{block}.attn.qkv", C, 3 * C, spec.qkv_bias)
        shapes |= linear(f"{block}.attn.proj", C, C)
        shapes |= linear(f"{block}.mlp.fc1", C, M) | linear(f"{block}.mlp.fc2", M, C)
        if spec.layer_scale is not None:
            shapes |= {f"{block}.ls1.gamma": (C,), f"{block}.ls2.gamma": (C,)}
    if spec.final_norm:
        return shapes | norm("norm", C)
    return shapes | norm("fc_norm", C) if kind == "classifier" else shapes
