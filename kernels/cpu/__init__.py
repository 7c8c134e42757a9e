"""C++ kernels for bfloat16 networks on CPUs that multiply bfloat16 matrices; images are channels_last.

==================  ==================================================================================
`winograd`          3x3 convolutions by Winograd's algorithm
`convolution`       other convolutions: strided ones, and those between few channels
`group_norm`        GroupNorm + SiLU
`resnet`            a residual block: both norms, activations and convolutions, shortcut and residual
`attention`         a self-attention block: norm, projections, softmax and residual
`library`           compiles the C++ sources beside these files where they are used
==================  ==================================================================================
"""
