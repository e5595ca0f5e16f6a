"""Models side by side on labelled pictures: each model's job and its rows, its measures, its speed, and a report."""
