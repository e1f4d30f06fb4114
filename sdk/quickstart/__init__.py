"""`nearfar quickstart`: the whole product on real models, in one command.

It uses what a user would use: the `nearfar convert` and `nearfar cloud` commands as processes of
their own, and `sdk.Client` in this one.
"""
