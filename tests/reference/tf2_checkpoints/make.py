"""Writes the checkpoints beside it by TensorFlow itself: `TF_USE_LEGACY_KERAS=1 python make.py` (tensorflow, tf_keras).

No test runs this; with a folder as its argument it writes larger ones there. The classes have the attributes of
google-research/simclr, tf2/{resnet,model}.py, since it is these that name the variables of an object-graph checkpoint;
layers without variables stand in where the authors have some, for they count. All numbers are random. Run with
tensorflow 2.21.0 and tf_keras 2.21.0.
"""

import sys
from pathlib import Path
from shutil import rmtree

import numpy as np
import tensorflow as tf  # pyrefly: ignore[missing-import]

L = tf.keras.layers
HERE = Path(__file__).parent


class Norm(L.Layer):
    def __init__(self, relu=True, center=True):
        super().__init__()
        self.relu, self.bn = relu, L.BatchNormalization(momentum=0.9, epsilon=1e-5, center=center, fused=False)

    def call(self, x, training):
        x = self.bn(x, training=training)
        return tf.nn.relu(x) if self.relu else x


class Conv(L.Layer):
    def __init__(self, filters, kernel, strides):
        super().__init__()
        self.fixed_padding = Padding(kernel) if strides > 1 else None
        self.conv2d = L.Conv2D(filters, kernel, strides, padding="same" if strides == 1 else "valid", use_bias=False)

    def call(self, x, training):
        return self.conv2d(x if self.fixed_padding is None else self.fixed_padding(x))


class Padding(L.Layer):
    def __init__(self, kernel):
        super().__init__()
        self.before, self.after = (kernel - 1) // 2, kernel - 1 - (kernel - 1) // 2

    def call(self, x, training=None):
        return tf.pad(x, [[0, 0], [self.before, self.after], [self.before, self.after], [0, 0]])


class Same(L.Layer):
    def call(self, x, training):
        return tf.identity(x)


class Plain(L.Layer):
    """A layer of Keras' own that is called with `training`."""

    def __init__(self, layer):
        super().__init__()
        self.inner = layer

    def call(self, x, training):
        return self.inner(x)


class SelectiveKernel(L.Layer):
    def __init__(self, filters, strides):
        super().__init__()
        self.conv2d_fixed_padding, self.batch_norm_relu = Conv(2 * filters, 3, strides), Norm()
        self.conv2d_0 = L.Conv2D(max(int(filters * 0.0625), 32), 1, use_bias=False)
        self.batch_norm_relu_1 = Norm()
        self.conv2d_1 = L.Conv2D(2 * filters, 1, use_bias=False)

    def call(self, x, training):
        branches = tf.stack(tf.split(self.batch_norm_relu(self.conv2d_fixed_padding(x, training), training), 2, axis=3))
        pooled = tf.reduce_mean(tf.reduce_sum(branches, axis=0), [1, 2], keepdims=True)
        scores = self.conv2d_1(self.batch_norm_relu_1(self.conv2d_0(pooled), training))
        return tf.reduce_sum(branches * tf.nn.softmax(tf.stack(tf.split(scores, 2, axis=3)), axis=0), axis=0)


def shortcut(filters, strides, sk):
    if not sk:
        return [Conv(filters, 1, strides), Norm(relu=False)]
    average = Plain(L.AveragePooling2D(2, strides, padding="same" if strides == 1 else "valid"))
    return [*([Padding(2)] if strides > 1 else []), average, Conv(filters, 1, 1), Norm(relu=False)]


class Basic(L.Layer):
    def __init__(self, filters, strides, project, sk):
        super().__init__()
        self.conv2d_bn_layers = []
        self.shortcut_layers = []
        for layer in shortcut(filters, strides, sk) if project else []:
            self.shortcut_layers.append(layer)
        for layer in (Conv(filters, 3, strides), Norm(), Conv(filters, 3, 1), Norm(relu=False)):
            self.conv2d_bn_layers.append(layer)

    def call(self, x, training):
        return tf.nn.relu(run(self.conv2d_bn_layers, x, training) + run(self.shortcut_layers, x, training))


class Bottleneck(L.Layer):
    def __init__(self, filters, strides, project, sk):
        super().__init__()
        self.projection_layers = []
        for layer in shortcut(4 * filters, strides, sk) if project else []:
            self.projection_layers.append(layer)
        self.shortcut_dropblock = Same()
        self.conv_relu_dropblock_layers = []
        middle = [SelectiveKernel(filters, strides)] if sk else [Conv(filters, 3, strides), Norm()]
        last = [Conv(4 * filters, 1, 1), Norm(relu=False), Same()]
        for layer in [Conv(filters, 1, 1), Norm(), Same(), *middle, Same(), *last]:
            self.conv_relu_dropblock_layers.append(layer)

    def call(self, x, training):
        return tf.nn.relu(run(self.conv_relu_dropblock_layers, x, training) + run(self.projection_layers, x, training))


class Group(L.Layer):
    def __init__(self, filters, block, blocks, strides, sk, name):
        super().__init__(name=name)
        self.layers = []
        for i in range(blocks):
            self.layers.append(block(filters, strides if i == 0 else 1, i == 0, sk))

    def call(self, x, training):
        return run(self.layers, x, training)


class Resnet(L.Layer):
    def __init__(self, block, blocks, channels, cifar, sk):
        super().__init__()
        self.initial_conv_relu_max_pool = []
        if cifar:
            stem = [Conv(channels, 3, 1), Same(), Norm(), Same()]
        else:
            half = max(channels // 2, 1)
            first = [Conv(half, 3, 2), Norm(), Conv(half, 3, 1), Norm(), Conv(channels, 3, 1)]
            pool = Plain(L.MaxPooling2D(3, 2, padding="same"))
            stem = [*(first if sk else [Conv(channels, 7, 2)]), Same(), Norm(), pool, Same()]
        for layer in stem:
            self.initial_conv_relu_max_pool.append(layer)
        self.block_groups = []
        for i, count in enumerate(blocks):
            group = Group(channels * 2**i, block, count, 1 if i == 0 else 2, sk, f"block_group{i + 1}")
            self.block_groups.append(group)

    def call(self, x, training):
        x = run(self.block_groups, run(self.initial_conv_relu_max_pool, x, training), training)
        return tf.reduce_mean(x, [1, 2])


class Linear(L.Layer):
    def __init__(self, units, use_bias=True, use_bn=False, name="linear_layer"):
        super().__init__(name=name)
        self.dense = L.Dense(units, use_bias=use_bias and not use_bn)
        if use_bn:
            self.bn_relu = Norm(relu=False, center=use_bias)

    def call(self, x, training):
        x = self.dense(x)
        return self.bn_relu(x, training) if hasattr(self, "bn_relu") else x


class ProjectionHead(L.Layer):
    def __init__(self, features, dim, layers):
        super().__init__()
        self.linear_layers = []
        for j in range(layers):
            last = j == layers - 1
            self.linear_layers.append(Linear(dim if last else features, not last, True, f"nl_{j}"))

    def call(self, x, training):
        for j, layer in enumerate(self.linear_layers):
            x = layer(x, training) if j == len(self.linear_layers) - 1 else tf.nn.relu(layer(x, training))
        return x


class SupervisedHead(L.Layer):
    def __init__(self, classes):
        super().__init__(name="head_supervised")
        self.linear_layer = Linear(classes)

    def call(self, x, training):
        return self.linear_layer(x, training)


class Model(tf.keras.models.Model):
    def __init__(self, block, blocks, channels, cifar, sk, dim, layers, classes):
        super().__init__()
        self.resnet_model = Resnet(block, blocks, channels, cifar, sk)
        features = channels * 8 * (4 if block is Bottleneck else 1)
        self._projection_head = ProjectionHead(features, dim, layers)
        self.supervised_head = SupervisedHead(classes)

    def __call__(self, x, training):
        h = self.resnet_model(x, training=training)
        return h, self._projection_head(h, training), self.supervised_head(h, training)


def run(layers, x, training):
    for layer in layers:
        x = layer(x, training=training)
    return x


class Module(tf.Module):
    """What the authors save for the hub."""

    def __init__(self, model):
        self.model = model
        self.trainable_variables_list = model.trainable_variables

    @tf.function
    def __call__(self, inputs, trainable):
        return {"final_avg_pool": self.model(inputs, training=trainable)[0]}


def write(folder, block, blocks, channels, size, *, sk=False, slots=False, saved_model=False):
    rng = np.random.default_rng(size)
    model = Model(block, blocks, channels, size <= 32, sk, dim=8, layers=3, classes=5)
    pixels = rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    x = pixels.astype("float32") / 255
    model(x, training=False)
    for variable in model.variables:
        fan_in = np.prod(variable.shape[:-1]) if len(variable.shape) > 1 else 10
        value = rng.normal(size=variable.shape) * fan_in**-0.5
        variable.assign(abs(value) + 0.5 if any(key in variable.name for key in ("gamma", "variance")) else value)
    h, z, logits = (output.numpy() for output in model(x, training=False))
    step = tf.Variable(100, dtype=tf.int64)
    if saved_model:
        module = Module(model)
        module.__call__.get_concrete_function(tf.TensorSpec([None, None, None, 3], tf.float32), trainable=False)
        tf.saved_model.save(module, str(folder))
        for file in (*folder.glob("*.pb"), *folder.glob("assets")):  # the graph itself: large, and not read
            rmtree(file) if file.is_dir() else file.unlink()
    else:
        optimizer = tf.keras.optimizers.legacy.SGD(0.1, momentum=0.9)
        if slots:
            optimizer.apply_gradients((tf.zeros_like(v), v) for v in model.trainable_variables)
        checkpoint = tf.train.Checkpoint(model=model, global_step=step, optimizer=optimizer)
        tf.train.CheckpointManager(checkpoint, str(folder), max_to_keep=1).save(checkpoint_number=100)
        (folder / "checkpoint").unlink()
    np.savez_compressed(folder / "outputs.npz", pixels=pixels, h=h, z=z, logits=logits)


if __name__ == "__main__":
    R18, R50 = (Basic, (2, 2, 2, 2)), (Bottleneck, (3, 4, 6, 3))
    if len(sys.argv) > 1:
        write(Path(sys.argv[1]) / "r50_sk", *R50, 2, 64, sk=True)
        write(Path(sys.argv[1]) / "r50_saved_model", *R50, 2, 65, saved_model=True)
    else:
        write(HERE / "r18_cifar", *R18, 1, 32, slots=True)
        write(HERE / "r18_sk", *R18, 2, 40, sk=True)
        write(HERE / "r18_saved_model", *R18, 1, 41, saved_model=True)
