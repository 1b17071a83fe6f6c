"""Lists of prompts, and the protocols that freeze how they are used."""
