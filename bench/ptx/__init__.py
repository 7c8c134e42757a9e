"""The compiled PTX of our kernels, executed on a CPU: what a GPU would run, without one.

The launchers run as they are, Triton compiles what they launch, and an interpreter in NumPy executes the PTX on the
tensors themselves. All kernels are held to their references, for every dtype, source of noise, alignment and option:
equal bits if the project promises them, else float64 within rounding, with approximate instructions (ex2, rsqrt,
div.full) that err by all that PTX allows. A fault is, besides a wrong result:

- an access outside the launch's tensors, between the elements of a strided one, or not aligned to its width;
- a read of memory that nobody wrote, and an address, a predicate or a stored value that depends on a register that
  nobody wrote, as after a masked load without ``other``;
- a result that changes with the order of the warps, and accesses that no barrier orders;
- a barrier, a shuffle or a product of matrices that not all threads reach, and an instruction that is not known;
- an access of memory that a cp.async, a wgmma or a tcgen05.mma in flight uses, or of a register of a wgmma or a
  tcgen05.ld in flight, and a product without the fences that its registers and its memory need;
- tensor memory that is not allocated, belongs to another warp, or is still allocated at the end, and a wait for an
  mbarrier that never comes.

Not checked: what ptxas makes of the PTX (it may contract products and sums that carry no rounding, which are those of
the norm), how long anything takes, and memory ordering beyond barriers and those fences (a tcgen05.fence is not asked
for). Code for AMD's gfx942 is not PTX: that our kernels compile for it without private memory is checked, and no
result is.

Commands::

    python -m stepfusion.bench.machine_code --execute [--quick] [--json] [--target sm_90]
"""
