"""From raw rows to packed batches; knows nothing of models, meshes or kernels."""
