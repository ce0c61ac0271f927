"""Watching: dashboards, rules, and whether today is like the time that the model was judged in."""
