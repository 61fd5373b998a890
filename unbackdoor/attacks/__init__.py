"""Backdoor attacks: triggers, and the poisoning of a training set with one.

Nothing that defends may import this package; a test walks the imports.
"""
