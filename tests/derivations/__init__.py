"""What each method and number means, line by line: a second program for each, in plain torch or numpy.

A file's top says in sentences and formulas what is meant and where it stands; what follows is that and nothing else, on
a tiny model's own weights, for one sequence, without regard to time. The tests at its end hold the package against it.
"""
