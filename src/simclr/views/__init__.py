"""Random views of images (paper sections 2.1 and 3, appendix A): pure functions of (seed, epoch, index, view).

    policy.py     what a view may look like (light: no torch)
    params.py     policy + counter -> the parameters of each view
    resize.py     crop and resize by explicit taps
    reference.py  images + parameters -> pixels: the definition that faster back ends are held to
    cpu.py        the same pixels by compiled kernels (kernels.py), which share a batch between threads
    cuda.py       the same pixels by Triton kernels (triton_kernels.py) from images on a GPU (device_images.py)
    views.py      make_views and eval_images: uint8 images in, batches for the encoder out
    stream.py     evaluation views of any number of images, in bounded memory

Import from the modules: this file stays empty of code so that `simclr.views.policy` never imports torch.
"""
