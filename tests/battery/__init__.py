"""The battery: promises every mechanism keeps with every position, as functions of a `Case`.

A check returns nothing and raises `AssertionError` where the promise is broken, so that the same
function can be shown to catch a fault (see `battery.faults`). A new file under
``attnlab/mechanisms`` or ``attnlab/positions`` is found through the registry; there is no list to
extend and none to skip.
"""
