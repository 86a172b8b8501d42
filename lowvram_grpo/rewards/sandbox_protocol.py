"""What sandbox.py and its child say to each other; apart, since the child's module imports what Windows lacks."""

# The exit code of a child that could not confine itself.
REFUSED = 97
# Stands before what a function has returned.
RESULT = "\x1e@returned "
