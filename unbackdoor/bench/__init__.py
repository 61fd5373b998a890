"""The benchmark: grids of cells, their records, and the tables and pictures made of them.

A cell is one backbone, one defense and one seed. What is done stands in a folder of records, so
any number of processes and machines can work on one grid and be killed at any moment.
"""
