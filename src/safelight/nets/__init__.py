"""Small trainable modules that know their shapes and losses, and nothing of pipelines."""
