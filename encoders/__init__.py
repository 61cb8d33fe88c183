"""Vision encoders: one contract, one catalog, and the methods that train and test them."""

from encoders import architectures as architectures  # registers this kit's networks with timm, so that open_clip finds them by name
