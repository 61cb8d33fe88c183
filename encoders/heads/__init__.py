"""Task heads for ViSFT: each a network on an encoder's feature map, with its loss and its way to predict. `registry` is the table."""
