"""Making a layer patchable: the hook points, and the two places where a forward pass is opened for them.

``names.py`` lists the hooks, ``attach.py`` puts them on a bridge. ``router.py`` and ``experts.py`` fire them within a
pass, ``blocks.py`` begins and ends it. What counts as an edit, and how it is noticed, is in ``edits.py`` alone; what is
refused of an edit, in ``layer.py``. ``passes.py`` knows the cache and the prompt, ``thread_ownership.py`` the threads.
"""
