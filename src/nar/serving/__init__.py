"""Many callers of one model: a batcher that knows no HTTP, and what answers over it."""
