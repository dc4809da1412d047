"""Functions of a model and a processor: asking, drawing, planning, looking at training examples.

The functions are exported by `molmo2` itself (`from molmo2 import ask, draw, plan`); the names here are those of the
modules. Drawing needs no torch.
"""

__all__ = ["answer", "ask", "draw", "draw_video", "media_files", "memory", "plan", "view"]
