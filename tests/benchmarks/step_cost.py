"""The name by which an earlier milestone asks for `two_tower_speed`, which prints its figures among others.

python -m tests.benchmarks.step_cost
"""

from tests.benchmarks.two_tower_speed import main

if __name__ == "__main__":
    main()
