"""The geometry of routing on plain arrays: what a linear router makes of the states that it reads."""
