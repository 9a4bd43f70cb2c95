"""Collectives of a program's text: bytes, and how often they run."""

from cacherl_jax.plan.hlo import Collective, collectives, size

# As XLA writes programs, shortened: a loop of 36 around a loop of unknown length; one gather split over two fusions.
TEXT = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%start (p: bf16[32,8]) -> bf16[256,8] {
  ROOT %all-gather.1 = bf16[256,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, dimensions={0}, metadata={op_name="jit(f)/while/body/BTD,DF->BTF/dot_general"}
}

%done (p: bf16[32,8]) -> bf16[256,8] {
  ROOT %all-gather.2 = bf16[256,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, dimensions={0}, metadata={op_name="jit(f)/while/body/BTD,DF->BTF/dot_general"}
}

%inner_condition (t: (s32[], s32[])) -> pred[] {
  ROOT %lt.1 = pred[] compare(%a, %b), direction=LT
}

%inner_body (t: (s32[], s32[])) -> (s32[], s32[]) {
  %permute = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=9, source_target_pairs={{0,1}}
}

%condition (t: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(36)
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (t: (s32[], /*index=1*/f32[8])) -> (s32[], f32[8]) {
  %fusion.1 = bf16[256,8]{1,0} fusion(%w), kind=kCustom, calls=%start
  %fusion.2 = bf16[256,8]{1,0} fusion(%w), kind=kCustom, calls=%done
  %while.2 = (s32[], s32[]) while(%t2), condition=%inner_condition, body=%inner_body
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %while.1 = (s32[], /*index=1*/f32[8]) while(%t), condition=%condition, body=%body
  %all-reduce.1 = (f32[8]{0}, pred[3]{0}) all-reduce(%a, %b), channel_id=1, to_apply=%add, metadata={op_name="jit(f)/psum"}
  %all-reduce.2 = f32[8]{0} all-reduce(%a), channel_id=2, to_apply=%add, metadata={op_name="jit(f)/reduce_sum"}
  %all-reduce.3 = f32[8]{0} all-reduce(%a), channel_id=3, to_apply=%add, metadata={op_name="jit(f)/reduce_sum"}
}
"""  # noqa: E501


def test_collectives_count_once_a_channel_and_as_often_as_their_loops_run():
    assert collectives(TEXT) == [
        Collective("all-gather", 256 * 8 * 2, (36,), "BTD,DF->BTF", 1),
        Collective("collective-permute", 16, (36, None), "", 1),
        Collective("all-reduce", 32, (), "reduce_sum", 2),
        Collective("all-reduce", 8 * 4 + 3, (), "psum", 1),
    ]
    assert [c.times for c in collectives(TEXT)] == [36, 36, 2, 1]


def test_a_backends_own_trip_count_is_taken():
    known = ', backend_config={"known_trip_count":{"n":"12"}}'
    text = TEXT.replace("condition=%condition, body=%body", "condition=%condition, body=%body" + known)
    assert collectives(text)[0].loops == (12,)


def test_bytes_of_types():
    assert size("(bf16[2,3]{1,0:T(8,128)(2,1)}, pred[5]{0}, s4[3]{0}, f8e4m3fn[7]{0}, u32[])") == 12 + 5 + 2 + 7 + 4
