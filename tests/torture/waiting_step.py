"""`train_accelerate.py`, whose sixth step waits while a file is there: time to do something to the run."""

import os
import sys

import faults

import train_accelerate

if __name__ == "__main__":
    faults.wait_while_file_exists(5, os.environ["WAIT_WHILE"])
    train_accelerate.main(sys.argv[1:])
