"""Comparisons of trained models: a study is a file of arms and seeds, its result a table with intervals."""
