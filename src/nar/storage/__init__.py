"""Model folders, atomic writes, strict recipes, published sizes."""
