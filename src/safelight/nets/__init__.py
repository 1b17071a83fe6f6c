"""Small trainable modules that know nothing of pipelines."""
