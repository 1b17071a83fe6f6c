"""Safety methods, one paper per file. The folder is the registry: `safelight.bundle.METHODS`."""
