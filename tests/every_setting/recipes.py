"""What the runs of every case have in common, as recipes; $NAME is an input of the tests."""

# 12 images, 3 steps an epoch.
SIMMIM = """\
output = "run"
device = "cpu"

[model]
name = "swin_tiny"
patch_size = 4
embed_dim = 16
depths = [1, 1]
num_heads = [2, 4]
window_size = 2

[data]
path = "$images"
image_size = 32
workers = 0

[mask]
unit = 8

[train]
steps = 3
batch_size = 4
precision = "float32"

[optim]
lr = 2e-3
lr_batch = 0

[schedule]
warmup_steps = 1
warmup_lr = 1e-4
min_lr = 1e-4

[checkpoint]
every_steps = 2

[log]
every_steps = 1
picture_every_steps = -1
"""

SWIN = SIMMIM[SIMMIM.index("[model]") : SIMMIM.index("[data]")]
VIT = """\
[model]
name = "vit_tiny_plain"
patch_size = 8
embed_dim = 32
depths = [1]
num_heads = [2]

"""

TOKENS = (
    SIMMIM.replace(SWIN, VIT).replace("unit = 8", "ratio = 0.6")
    + """
[method]
name = "tokens"
"""
)

SIMSIAM = (
    SIMMIM.replace("[mask]\nunit = 8\n\n", "")
    + """
[method]
name = "simsiam"
projector_width = 24
predictor_width = 8
"""
)

# 12 images of three classes and 6 to evaluate on. Crop and flip alone do without timm.
FINETUNE = """\
output = "run"
device = "cpu"
pretrained = "$pretrained"

[data]
path = "$labelled"
workers = 0

[train]
steps = 3
batch_size = 4
precision = "float32"

[augment]
auto_augment = ""
color_jitter = 0
erase = 0
mixup = 0
cutmix = 0

[optim]
lr = 1e-3
lr_batch = 0

[schedule]
warmup_steps = 1
warmup_lr = 1e-4
min_lr = 1e-4

[checkpoint]
every_steps = 2

[log]
every_steps = 1
"""

# The published recipe, of which the tests' stand-in for timm draws nothing.
FINETUNE_WITH_TIMM = FINETUNE[: FINETUNE.index("[augment]")] + FINETUNE[FINETUNE.index("[optim]") :]

_FROM_WEIGHTS = 'pretrained = "$pretrained"\n'
FROM_SCRATCH_SWIN = FINETUNE.replace(_FROM_WEIGHTS, SWIN).replace(
    "[data]", "[data]\nimage_size = 32"
)
FROM_SCRATCH_VIT = FROM_SCRATCH_SWIN.replace(SWIN, VIT)
