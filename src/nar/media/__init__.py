"""Arrays and files of pictures and clips; no models."""
