"""Pages and tables: runs side by side, curves, leaderboards."""
