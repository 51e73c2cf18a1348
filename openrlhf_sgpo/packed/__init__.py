"""Forward passes without padding: prompts once, their responses behind them, and a head that keeps no logits."""
