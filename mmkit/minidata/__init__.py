"""The embedded world: OpenMoji drawings with Unicode's names, scenes made of them, and the language that speaks of them."""
