"""The people in the recipe: a page on which they rank completions, write demonstrations and say which they prefer.

``tasks.py`` reads what is to be labelled, ``store.py`` keeps it and every answer on the disk, ``app.py`` is the page,
``guard.py`` what it lets in, ``command.py`` the command ``rlhf label``, ``export.py`` and ``report.py`` what comes out.
"""

from rlhf.label.command import label

__all__ = ["label"]
