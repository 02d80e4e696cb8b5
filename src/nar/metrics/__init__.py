"""Numbers that judge pictures and clips, whoever made them."""
