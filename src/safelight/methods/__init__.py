"""Safety methods, one paper per file. The folder is the registry: `safelight.methods.registry()`."""
