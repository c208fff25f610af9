"""Compiled programs, and what can be read from them without running them.

chips      the accelerators that programs are compiled for, and what they can do at most
compilers  compiles a function for one of them, where there is none
hlo        the optimized program: its instructions, who calls and who uses what, how often loops run
schedules  how long kernels that are written by hand take, each compiled alone
costs      what a program costs by its own text: cycles, arithmetic, collectives
estimates  what that takes on the target, and the least it could
weights    where the codes of a weight go, and what multiplies them
"""
