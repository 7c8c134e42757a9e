"""C++ kernels for CPUs: of networks in float32 and bfloat16, whose images are channels_last, and of sampling steps.

===================  =================================================================================
`winograd`           3x3 convolutions by Winograd's algorithm
`convolution`        other convolutions: strided ones, and those between few channels
`group_norm`         GroupNorm + SiLU
`resnet`             a residual block: both norms, activations and convolutions, shortcut and residual
`attention`          a self-attention block: norm, projections, softmax and residual
`library`            loads these, for a dtype and an instruction set, and calls them
`compiler`           loads a library: prebuilt, or compiled once on a machine
`prebuild`           compiles all of them for a wheel of one platform
===================  =================================================================================
"""
