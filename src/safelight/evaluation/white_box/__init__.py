"""What white-box attacks share: words as tokens, gradients through a guard, discrete search."""
