"""The reader of optimized HLO finds whole values in HBM, and nothing else."""

from benchmarks.tpu_hlo import large_values, near_bytes

# Abridged from what the compiler printed for a decoding loop; one layer's cache is bf16[1,16,2048,128].
PROGRAM = """HloModule jit_decode_steps, is_scheduled=true

%fused_computation.1 (param_0: bf16[16,1,16,2048,128], param_1: bf16[1,1,16,1,128]) -> bf16[16,1,16,2048,128] {
  %param_0 = bf16[16,1,16,2048,128]{4,3,2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[1,1,16,1,128]{4,3,2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %dus.1 = bf16[16,1,16,2048,128]{4,3,2,1,0:T(8,128)(2,1)} dynamic-update-slice(%param_0, %param_1), metadata={}
}

%fused_computation.2 (param_0: bf16[16,2048,2048]) -> f32[16,512,2048] {
  %param_0 = bf16[16,2048,2048]{2,1,0:T(8,128)(2,1)} parameter(0)
  %inner = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0), dynamic_slice_sizes={1,2048,2048}
  ROOT %product = f32[16,512,2048]{2,1,0:T(8,128)} convolution(%inner, %inner), dim_labels=bf_io->bf
}

%body.1 (carry: (s32[], bf16[16,1,16,2048,128])) -> (s32[], bf16[16,1,16,2048,128]) {
  %carry = (s32[]{:T(128)}, bf16[16,1,16,2048,128]{4,3,2,1,0:T(8,128)(2,1)}) parameter(0)
  %cache = bf16[16,1,16,2048,128]{4,3,2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %written = bf16[16,1,16,2048,128]{4,3,2,1,0:T(8,128)(2,1)} fusion(%cache), kind=kLoop, calls=%fused_computation.1
  %near = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%weights), dynamic_slice_sizes={1,2048,2048}
  %mixed = f32[16,512,2048]{2,1,0:T(8,128)S(1)} fusion(%weights), kind=kOutput, calls=%fused_computation.2
  %small = bf16[1,512,2048]{2,1,0:T(8,128)(2,1)} copy(%near)
  FUSED
  FAR
  ROOT %out = (s32[]{:T(128)}, bf16[16,1,16,2048,128]{4,3,2,1,0:T(8,128)(2,1)}) tuple(%i, %written)
}
"""
WEIGHTS = {("bf16", 2048 * 2048), ("bf16", 16 * 16 * 2048 * 128)}


def program(fused: str = "", far: str = "") -> str:
    return PROGRAM.replace("FUSED", fused).replace("FAR", far)


def test_updates_in_place_and_values_in_vmem_or_within_a_fusion_are_nothing() -> None:
    assert large_values(program(), WEIGHTS) == ([], [])


def test_results_as_large_as_a_weight_are_copies_and_others_are_activations() -> None:
    scores = "%scores = f32[16,512,2048]{2,1,0:T(8,128)} fusion(%weights), kind=kOutput, calls=%fused_computation.2"
    turned = "%turned = bf16[16,1,16,2048,128]{4,2,3,1,0:T(8,128)(2,1)} copy(%cache)"
    assert large_values(program(scores, turned), WEIGHTS) == (
        ["copy bf16[16,1,16,2048,128]"],
        ["fusion f32[16,512,2048]"],
    )


def test_an_asynchronous_copy_counts_once_and_by_where_it_ends() -> None:
    def pair(space: str) -> str:
        layout = "{2,1,0:T(8,128)(2,1)" + space + "}"
        types = f"(bf16[1,2048,2048]{layout}, bf16[1,2048,2048]{{2,1,0:T(8,128)(2,1)S(1)}}, u32[]{{:S(2)}})"
        return f"%start = {types} copy-start(%near)\n  %done = bf16[1,2048,2048]{layout} copy-done(%start)"

    assert large_values(program(pair("")), WEIGHTS) == (["copy-done bf16[1,2048,2048]"], [])
    assert large_values(program(pair("S(1)")), WEIGHTS) == ([], [])


def test_an_update_that_also_writes_something_else_is_seen() -> None:
    both = (
        "%both = (bf16[16,1,16,2048,128]{4,3,2,1,0:T(8,128)(2,1)}, bf16[2048,2048]{1,0:T(8,128)(2,1)})"
        " fusion(%cache), kind=kLoop, calls=%fused_computation.1"
    )
    assert large_values(program(both), WEIGHTS) == (["fusion bf16[2048,2048]"], [])


def test_values_in_vmem_count_where_written_and_where_read_whole() -> None:
    weight, scores = 2 * 2048 * 2048, 4 * 16 * 512 * 2048  # bytes of `near` and of `mixed`
    written = weight + scores
    # The copy takes all of `near`; a fusion that slices its operand takes an unknown part, so nothing is counted.
    assert near_bytes(program()) == written + weight
    sliced = "%part = f32[16,512,2048]{2,1,0:T(8,128)} fusion(%near), kind=kOutput, calls=%fused_computation.2"
    assert near_bytes(program(sliced)) == written + weight
    whole = "%whole = f32[16,512,2048]{2,1,0:T(8,128)} negate(%mixed)"
    assert near_bytes(program(sliced, whole)) == written + weight + scores


def test_kernels_and_transfers_into_vmem_count_elsewhere() -> None:
    kernel = '%kernel = f32[16,512,2048]{2,1,0:T(8,128)S(1)} custom-call(%mixed), custom_call_target="tpu_custom_call"'
    done = "%done = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)S(1)} copy-done(%start)"
    assert near_bytes(program(kernel, done)) == near_bytes(program())
