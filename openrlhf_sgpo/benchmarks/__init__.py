"""The command evaluate: benchmarks, who judges them, and the leaderboard."""
