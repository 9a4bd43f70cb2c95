"""Attention: every implementation means the same, on any mesh; over a cache it reads each row's own slots."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np

from cacherl_jax.model.attention import attend, attend_cache


def by_numpy(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTNH, k_BSKH, v_BSKH))
    out = np.zeros(q.shape)
    for n in range(q.shape[2]):
        of = n // (q.shape[2] // k.shape[2])
        scores = np.einsum("BTH,BSH->BTS", q[:, :, n], k[:, :, of]) / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True)) * mask_BTS
        out[:, :, n] = np.einsum("BTS,BSH->BTH", weights / weights.sum(axis=-1, keepdims=True), v[:, :, of])
    return out


def inputs(B, T, N, K, H):
    """Queries, keys, values, and rows of two segments and padding; a row without padding; one segment alone."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K))
    segments_BT = np.ones((B, T), np.int32)
    segments_BT[0, T // 3 :], segments_BT[0, T - 7 :], segments_BT[1, T // 2 :] = 2, 0, 2
    return q, k, v, jnp.asarray(segments_BT)


def test_splash_and_reference_mean_the_same_as_numpy_and_so_do_their_gradients():
    q, k, v, segments_BT = inputs(B=3, T=256, N=4, K=2, H=128)

    def weighed(q, k, v, implementation):
        o_BTNH = attend(q, k, v, segments_BT, None, implementation)
        return (o_BTNH * jnp.cos(jnp.arange(o_BTNH.size, dtype=jnp.float32)).reshape(o_BTNH.shape)).sum(), o_BTNH

    found = {
        name: jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2), has_aux=True), static_argnums=3)(q, k, v, name)
        for name in ("reference", "splash_interpreted")
    }
    segments = np.asarray(segments_BT)
    mask_BTS = np.tri(256, dtype=bool) & (segments[:, :, None] == segments[:, None, :])
    np.testing.assert_allclose(found["reference"][0][1], by_numpy(q, k, v, mask_BTS), atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-4), *found.values())


def test_rows_heads_and_tokens_over_eight_devices_mean_the_same():
    program = """
        import jax, numpy as np, sys
        sys.path.insert(0, "tests/model")
        from test_attention import inputs
        from cacherl_jax.config import MeshConfig
        from cacherl_jax.mesh import make_mesh
        from cacherl_jax.model.attention import attend
        jax.config.update("jax_disable_most_optimizations", True)
        mesh = make_mesh(MeshConfig(data=2, seq=2, tp=2))
        arrays = inputs(B=2, T=256, N=4, K=2, H=128)
        one = attend(*arrays, None, "reference")
        for name in ("reference", "splash_interpreted"):
            eight = jax.jit(attend, static_argnums=(4, 5))(*arrays, mesh, name)
            np.testing.assert_allclose(one, eight, atol=3e-6)
            assert eight.sharding.shard_shape(eight.shape) == (1, 128, 2, 128), eight.sharding
    """
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_row_reads_its_own_slots_whatever_longer_rows_read():
    """Attention over the cache goes by blocks up to the furthest row: same bits in any company, values as by NumPy."""
    rng = np.random.default_rng(0)
    L, B, K, S, H, T = 2, 3, 2, 700, 8, 300
    k, v = (jnp.asarray(rng.normal(size=(L, B, K, S, H)), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.normal(size=(B, T, 4, H)), jnp.float32)
    new_k, new_v = (jnp.asarray(rng.normal(size=(B, T, K, H)), jnp.float32) for _ in range(2))

    def read(starts):
        return attend_cache(q, new_k, new_v, k, v, jnp.int32(1), jnp.asarray(starts))

    def expected(q, new_k, new_v, k, v, starts):
        """By NumPy, over the cached slots with the new ones behind them."""
        T = q.shape[1]
        k, v = (np.concatenate([x, np.asarray(new).transpose(0, 2, 1, 3)], axis=2) for x, new in ((k, new_k), (v, new_v)))
        cached_BTS = np.broadcast_to(np.arange(S) < np.array(starts)[:, None, None], (len(starts), T, S))
        mask_BTX = np.concatenate([cached_BTS, np.broadcast_to(np.tri(T, dtype=bool), (len(starts), T, T))], axis=2)
        return by_numpy(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), mask_BTX)

    for starts in ([5, 254, 690], [5, 600, 0]):
        found = read(starts)
        np.testing.assert_allclose(found, expected(q, new_k, new_v, k[1], v[1], starts), atol=2e-6)
        np.testing.assert_array_equal(found[0], read([5, 0, 0])[0])
    rows, starts = jnp.array([2, 0]), [301, 21]
    q, new_k, new_v = q[:2, :1], new_k[:2, :1], new_v[:2, :1]
    found = attend_cache(q, new_k, new_v, k, v, jnp.int32(0), jnp.asarray(starts), rows)
    np.testing.assert_allclose(found, expected(q, new_k, new_v, k[0][rows], v[0][rows], starts), atol=2e-6)
