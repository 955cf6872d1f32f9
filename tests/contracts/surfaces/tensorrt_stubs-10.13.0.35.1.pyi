# Names, parameters and types alone, from tensorrt_stubs-10.13.0.35.1-py3-none-any.whl
# SHA-256 749a36a1f825db0800a82d0dabbf7ef49f3a9edc1e794c9545fb94a551613fea, by tests/contracts/make_surfaces.py.
from typing import Any, Callable, ClassVar, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union, overload

import numpy

__version__: str

class Enum:
    """What pybind11 gives every enumeration."""

    name: str
    value: int
    __members__: ClassVar[Dict[str, Any]]
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    def __index__(self) -> int: ...

class Builder:
    error_recorder: Any
    max_threads: int

    def __init__(self, logger: ILogger) -> None:
        ...

    def build_engine_with_config(self, network: INetworkDefinition, config: IBuilderConfig) -> ICudaEngine:
        ...

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory:
        ...

    def build_serialized_network_to_stream(self, network: INetworkDefinition, config: IBuilderConfig, writer: Any) -> bool:
        ...

    def create_builder_config(self) -> IBuilderConfig:
        ...

    def create_network(self, flags: int=0) -> INetworkDefinition:
        ...

    def create_optimization_profile(self) -> IOptimizationProfile:
        ...

    def get_plugin_registry(self) -> Any:
        ...

    def is_network_supported(self, network: INetworkDefinition, config: IBuilderConfig) -> bool:
        ...

    def reset(self) -> None:
        ...

    @property
    def logger(self) -> ILogger:
        ...

    @property
    def max_DLA_batch_size(self) -> int:
        ...

    @property
    def num_DLA_cores(self) -> int:
        ...

    @property
    def platform_has_fast_fp16(self) -> bool:
        ...

    @property
    def platform_has_fast_int8(self) -> bool:
        ...

    @property
    def platform_has_tf32(self) -> bool:
        ...
class BuilderFlag(Enum):
    BF16: ClassVar[BuilderFlag]
    DEBUG: ClassVar[BuilderFlag]
    DIRECT_IO: ClassVar[BuilderFlag]
    DISABLE_COMPILATION_CACHE: ClassVar[BuilderFlag]
    DISABLE_TIMING_CACHE: ClassVar[BuilderFlag]
    DISTRIBUTIVE_INDEPENDENCE: ClassVar[BuilderFlag]
    EDITABLE_TIMING_CACHE: ClassVar[BuilderFlag]
    ERROR_ON_TIMING_CACHE_MISS: ClassVar[BuilderFlag]
    EXCLUDE_LEAN_RUNTIME: ClassVar[BuilderFlag]
    FP16: ClassVar[BuilderFlag]
    FP4: ClassVar[BuilderFlag]
    FP8: ClassVar[BuilderFlag]
    GPU_FALLBACK: ClassVar[BuilderFlag]
    INT4: ClassVar[BuilderFlag]
    INT8: ClassVar[BuilderFlag]
    MONITOR_MEMORY: ClassVar[BuilderFlag]
    OBEY_PRECISION_CONSTRAINTS: ClassVar[BuilderFlag]
    PREFER_PRECISION_CONSTRAINTS: ClassVar[BuilderFlag]
    REFIT: ClassVar[BuilderFlag]
    REFIT_IDENTICAL: ClassVar[BuilderFlag]
    REFIT_INDIVIDUAL: ClassVar[BuilderFlag]
    REJECT_EMPTY_ALGORITHMS: ClassVar[BuilderFlag]
    SAFETY_SCOPE: ClassVar[BuilderFlag]
    SPARSE_WEIGHTS: ClassVar[BuilderFlag]
    STRICT_NANS: ClassVar[BuilderFlag]
    STRIP_PLAN: ClassVar[BuilderFlag]
    TF32: ClassVar[BuilderFlag]
    VERSION_COMPATIBLE: ClassVar[BuilderFlag]
    WEIGHTLESS: ClassVar[BuilderFlag]
    WEIGHT_STREAMING: ClassVar[BuilderFlag]
class DataType(Enum):
    BF16: ClassVar[DataType]
    BOOL: ClassVar[DataType]
    E8M0: ClassVar[DataType]
    FLOAT: ClassVar[DataType]
    FP4: ClassVar[DataType]
    FP8: ClassVar[DataType]
    HALF: ClassVar[DataType]
    INT32: ClassVar[DataType]
    INT4: ClassVar[DataType]
    INT64: ClassVar[DataType]
    INT8: ClassVar[DataType]
    UINT8: ClassVar[DataType]
class DeviceType(Enum):
    DLA: ClassVar[DeviceType]
    GPU: ClassVar[DeviceType]
class Dims:
    MAX_DIMS: ClassVar[int] = 8

    @overload
    def __getitem__(self, arg0: int) -> int:
        ...

    @overload
    def __getitem__(self, arg0: Any) -> tuple:
        ...

    @overload
    def __init__(self) -> None:
        ...

    @overload
    def __init__(self, shape: list[int]) -> None:
        ...

    def __len__(self) -> int:
        ...

    def __iter__(self) -> Iterator[int]:
        ...
class EngineCapability(Enum):
    DLA_STANDALONE: ClassVar[EngineCapability]
    SAFETY: ClassVar[EngineCapability]
    STANDARD: ClassVar[EngineCapability]
class EngineInspector:
    error_recorder: Any
    execution_context: IExecutionContext

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        ...

    def get_layer_information(self, layer_index: int, format: LayerInformationFormat) -> str:
        ...
class ExecutionContextAllocationStrategy(Enum):
    ON_PROFILE_CHANGE: ClassVar[ExecutionContextAllocationStrategy]
    STATIC: ClassVar[ExecutionContextAllocationStrategy]
    USER_MANAGED: ClassVar[ExecutionContextAllocationStrategy]
class HardwareCompatibilityLevel(Enum):
    AMPERE_PLUS: ClassVar[HardwareCompatibilityLevel]
    NONE: ClassVar[HardwareCompatibilityLevel]
    SAME_COMPUTE_CAPABILITY: ClassVar[HardwareCompatibilityLevel]
class IBuilderConfig:
    DLA_core: int
    algorithm_selector: Any
    avg_timing_iterations: int
    builder_optimization_level: int
    default_device_type: DeviceType
    engine_capability: EngineCapability
    flags: int
    hardware_compatibility_level: HardwareCompatibilityLevel
    int8_calibrator: Any
    l2_limit_for_tiling: int
    max_aux_streams: int
    max_num_tactics: int
    plugins_to_serialize: list[str]
    profile_stream: int
    profiling_verbosity: ProfilingVerbosity
    progress_monitor: IProgressMonitor
    quantization_flags: int
    remote_auto_tuning_config: str
    runtime_platform: RuntimePlatform
    tiling_optimization_level: TilingOptimizationLevel

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        ...

    def can_run_on_DLA(self, layer: ILayer) -> bool:
        ...

    def clear_flag(self, flag: BuilderFlag) -> None:
        ...

    def clear_quantization_flag(self, flag: Any) -> None:
        ...

    def create_timing_cache(self, serialized_timing_cache: Any) -> ITimingCache:
        ...

    def get_calibration_profile(self) -> IOptimizationProfile:
        ...

    def get_device_type(self, layer: ILayer) -> DeviceType:
        ...

    def get_flag(self, flag: BuilderFlag) -> bool:
        ...

    def get_memory_pool_limit(self, pool: MemoryPoolType) -> int:
        ...

    def get_preview_feature(self, feature: PreviewFeature) -> bool:
        ...

    def get_quantization_flag(self, flag: Any) -> bool:
        ...

    def get_tactic_sources(self) -> int:
        ...

    def get_timing_cache(self) -> ITimingCache:
        ...

    def is_device_type_set(self, layer: ILayer) -> bool:
        ...

    def reset(self) -> None:
        ...

    def reset_device_type(self, layer: ILayer) -> None:
        ...

    def set_calibration_profile(self, profile: IOptimizationProfile) -> bool:
        ...

    def set_device_type(self, layer: ILayer, device_type: DeviceType) -> None:
        ...

    def set_flag(self, flag: BuilderFlag) -> None:
        ...

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        ...

    def set_preview_feature(self, feature: PreviewFeature, enable: bool) -> None:
        ...

    def set_quantization_flag(self, flag: Any) -> None:
        ...

    def set_tactic_sources(self, tactic_sources: int) -> bool:
        ...

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        ...

    @property
    def num_optimization_profiles(self) -> int:
        ...
class ICudaEngine:
    error_recorder: Any
    weight_streaming_budget: int
    weight_streaming_budget_v2: int

    def __getitem__(self, arg0: int) -> str:
        ...

    def create_engine_inspector(self) -> EngineInspector:
        ...

    @overload
    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy=...) -> IExecutionContext:
        ...

    @overload
    def create_execution_context(self, runtime_config: IRuntimeConfig=None) -> IExecutionContext:
        ...

    def create_execution_context_without_device_memory(self) -> IExecutionContext:
        ...

    def create_runtime_config(self) -> IRuntimeConfig:
        ...

    def create_serialization_config(self) -> ISerializationConfig:
        ...

    def get_device_memory_size_for_profile(self, profile_index: int) -> int:
        ...

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        ...

    @overload
    def get_tensor_bytes_per_component(self, name: str) -> int:
        ...

    @overload
    def get_tensor_bytes_per_component(self, name: str, profile_index: int) -> int:
        ...

    @overload
    def get_tensor_components_per_element(self, name: str) -> int:
        ...

    @overload
    def get_tensor_components_per_element(self, name: str, profile_index: int) -> int:
        ...

    def get_tensor_dtype(self, name: str) -> DataType:
        ...

    @overload
    def get_tensor_format(self, name: str) -> TensorFormat:
        ...

    @overload
    def get_tensor_format(self, name: str, profile_index: int) -> TensorFormat:
        ...

    @overload
    def get_tensor_format_desc(self, name: str) -> str:
        ...

    @overload
    def get_tensor_format_desc(self, name: str, profile_index: int) -> str:
        ...

    def get_tensor_location(self, name: str) -> TensorLocation:
        ...

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        ...

    def get_tensor_name(self, index: int) -> str:
        ...

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        ...

    def get_tensor_profile_values(self, name: int, profile_index: str) -> list[list[int]]:
        ...

    def get_tensor_shape(self, name: str) -> Dims:
        ...

    @overload
    def get_tensor_vectorized_dim(self, name: str) -> int:
        ...

    @overload
    def get_tensor_vectorized_dim(self, name: str, profile_index: int) -> int:
        ...

    def get_weight_streaming_automatic_budget(self) -> int:
        ...

    def is_debug_tensor(self, name: str) -> bool:
        ...

    def is_shape_inference_io(self, name: str) -> bool:
        ...

    def serialize(self) -> IHostMemory:
        ...

    def serialize_with_config(self, arg0: ISerializationConfig) -> IHostMemory:
        ...

    @property
    def device_memory_size(self) -> int:
        ...

    @property
    def device_memory_size_v2(self) -> int:
        ...

    @property
    def engine_capability(self) -> EngineCapability:
        ...

    @property
    def hardware_compatibility_level(self) -> Any:
        ...

    @property
    def has_implicit_batch_dimension(self) -> bool:
        ...

    @property
    def minimum_weight_streaming_budget(self) -> int:
        ...

    @property
    def name(self) -> str:
        ...

    @property
    def num_aux_streams(self) -> int:
        ...

    @property
    def num_io_tensors(self) -> int:
        ...

    @property
    def num_layers(self) -> int:
        ...

    @property
    def num_optimization_profiles(self) -> int:
        ...

    @property
    def profiling_verbosity(self) -> Any:
        ...

    @property
    def refittable(self) -> bool:
        ...

    @property
    def streamable_weights_size(self) -> int:
        ...

    @property
    def tactic_sources(self) -> int:
        ...

    @property
    def weight_streaming_scratch_memory_size(self) -> int:
        ...
class IExecutionContext:
    debug_sync: bool
    enqueue_emits_profile: bool
    error_recorder: Any
    name: str
    nvtx_verbosity: Any
    persistent_cache_limit: int
    profiler: IProfiler
    temporary_allocator: Any
    unfused_tensors_debug_state: bool

    def execute_async_v3(self, stream_handle: int) -> bool:
        ...

    def execute_v2(self, bindings: list[int]) -> bool:
        ...

    def get_debug_listener(self) -> Any:
        ...

    def get_debug_state(self, name: str) -> bool:
        ...

    def get_input_consumed_event(self) -> int:
        ...

    def get_max_output_size(self, name: str) -> int:
        ...

    def get_output_allocator(self, name: str) -> Any:
        ...

    def get_runtime_config(self) -> Any:
        ...

    def get_tensor_address(self, name: str) -> int:
        ...

    def get_tensor_shape(self, name: str) -> Dims:
        ...

    def get_tensor_strides(self, name: str) -> Dims:
        ...

    def infer_shapes(self) -> list[str]:
        ...

    def report_to_profiler(self) -> bool:
        ...

    def set_all_tensors_debug_state(self, flag: bool) -> bool:
        ...

    def set_aux_streams(self, aux_streams: list[int]) -> None:
        ...

    def set_debug_listener(self, listener: Any) -> bool:
        ...

    def set_device_memory(self, memory: int, size: int) -> None:
        ...

    def set_input_consumed_event(self, event: int) -> bool:
        ...

    @overload
    def set_input_shape(self, name: str, shape: tuple) -> bool:
        ...

    @overload
    def set_input_shape(self, name: str, shape: list) -> bool:
        ...

    @overload
    def set_input_shape(self, name: str, shape: Union[Dims, Sequence[int]]) -> bool:
        ...

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        ...

    def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
        ...

    def set_tensor_address(self, name: str, memory: int) -> bool:
        ...

    def set_tensor_debug_state(self, name: str, flag: bool) -> bool:
        ...

    def update_device_memory_size_for_shapes(self) -> int:
        ...

    @property
    def active_optimization_profile(self) -> int:
        ...

    @property
    def all_binding_shapes_specified(self) -> bool:
        ...

    @property
    def all_shape_inputs_specified(self) -> bool:
        ...

    @property
    def engine(self) -> Any:
        ...
class IHostMemory:

    @property
    def dtype(self) -> DataType:
        ...

    @property
    def nbytes(self) -> int:
        ...

    def __buffer__(self, flags: int, /) -> memoryview:
        ...
class ILayer:
    metadata: str
    name: str
    precision: DataType

    def get_input(self, index: int) -> ITensor:
        ...

    def get_output(self, index: int) -> ITensor:
        ...

    def get_output_type(self, index: int) -> DataType:
        ...

    def output_type_is_set(self, index: int) -> bool:
        ...

    def reset_output_type(self, index: int) -> None:
        ...

    def reset_precision(self) -> None:
        ...

    def set_input(self, index: int, tensor: ITensor) -> None:
        ...

    def set_output_type(self, index: int, dtype: DataType) -> None:
        ...

    @property
    def num_inputs(self) -> int:
        ...

    @property
    def num_outputs(self) -> int:
        ...

    @property
    def precision_is_set(self) -> bool:
        ...

    @property
    def type(self) -> LayerType:
        ...
class ILogger:

    class Severity(Enum):
        ERROR: ClassVar[ILogger.Severity]
        INFO: ClassVar[ILogger.Severity]
        INTERNAL_ERROR: ClassVar[ILogger.Severity]
        VERBOSE: ClassVar[ILogger.Severity]
        WARNING: ClassVar[ILogger.Severity]
    ERROR: ClassVar[ILogger.Severity]
    INFO: ClassVar[ILogger.Severity]
    INTERNAL_ERROR: ClassVar[ILogger.Severity]
    VERBOSE: ClassVar[ILogger.Severity]
    WARNING: ClassVar[ILogger.Severity]

    def __init__(self) -> None:
        ...

    def log(self, severity: ILogger.Severity, msg: str) -> None:
        ...
class INetworkDefinition:
    error_recorder: Any
    name: str

    def __getitem__(self, arg0: int) -> ILayer:
        ...

    def __len__(self) -> int:
        ...

    def are_weights_marked_refittable(self, name: str) -> bool:
        ...

    def get_flag(self, flag: Any) -> bool:
        ...

    def get_input(self, index: int) -> ITensor:
        ...

    def get_layer(self, index: int) -> ILayer:
        ...

    def get_output(self, index: int) -> ITensor:
        ...

    def is_debug_tensor(self, tensor: ITensor) -> bool:
        ...

    def mark_debug(self, tensor: ITensor) -> bool:
        ...

    def mark_output(self, tensor: ITensor) -> None:
        ...

    def mark_output_for_shapes(self, tensor: ITensor) -> bool:
        ...

    def mark_unfused_tensors_as_debug_tensors(self) -> bool:
        ...

    def mark_weights_refittable(self, name: str) -> bool:
        ...

    def remove_tensor(self, tensor: ITensor) -> None:
        ...

    def set_weights_name(self, weights: Union[Weights, numpy.ndarray[Any, Any]], name: str) -> bool:
        ...

    def unmark_debug(self, tensor: ITensor) -> bool:
        ...

    def unmark_output(self, tensor: ITensor) -> None:
        ...

    def unmark_output_for_shapes(self, tensor: ITensor) -> bool:
        ...

    def unmark_unfused_tensors_as_debug_tensors(self) -> bool:
        ...

    def unmark_weights_refittable(self, name: str) -> bool:
        ...

    @property
    def builder(self) -> Any:
        ...

    @property
    def flags(self) -> int:
        ...

    @property
    def has_implicit_batch_dimension(self) -> bool:
        ...

    @property
    def num_inputs(self) -> int:
        ...

    @property
    def num_layers(self) -> int:
        ...

    @property
    def num_outputs(self) -> int:
        ...
class IOptimizationProfile:
    extra_memory_target: float

    def get_shape(self, input: str) -> list[Dims]:
        ...

    def get_shape_input(self, input: str) -> list[list[int]]:
        ...

    def set_shape(self, input: str, min: Union[Dims, Sequence[int]], opt: Union[Dims, Sequence[int]], max: Union[Dims, Sequence[int]]) -> None:
        ...

    def set_shape_input(self, input: str, min: list[int], opt: list[int], max: list[int]) -> None:
        ...
class IProfiler:

    def __init__(self) -> None:
        ...

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        ...
class IProgressMonitor:

    def __init__(self) -> None:
        ...

    def phase_finish(self, phase_name: str) -> None:
        ...

    def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
        ...

    def step_complete(self, phase_name: str, step: int) -> bool:
        ...
class IRuntimeConfig:

    def get_execution_context_allocation_strategy(self) -> ExecutionContextAllocationStrategy:
        ...

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy=...) -> None:
        ...
class ISerializationConfig:
    flags: int

    def clear_flag(self, flag: SerializationFlag) -> bool:
        ...

    def get_flag(self, flag: SerializationFlag) -> bool:
        ...

    def set_flag(self, flag: SerializationFlag) -> bool:
        ...
class ITensor:
    allowed_formats: int
    broadcast_across_batch: bool
    dtype: DataType
    location: Any
    name: str
    shape: Dims

    def get_dimension_name(self, index: int) -> str:
        ...

    def reset_dynamic_range(self) -> None:
        ...

    def set_dimension_name(self, index: int, name: str) -> None:
        ...

    def set_dynamic_range(self, min: float, max: float) -> bool:
        ...

    @property
    def dynamic_range(self) -> Any:
        ...

    @dynamic_range.setter
    def dynamic_range(self, arg1: list[float]) -> None:
        ...

    @property
    def is_execution_tensor(self) -> bool:
        ...

    @property
    def is_network_input(self) -> bool:
        ...

    @property
    def is_network_output(self) -> bool:
        ...

    @property
    def is_shape_tensor(self) -> bool:
        ...
class ITimingCache:

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        ...

    def query(self, key: Any) -> Any:
        ...

    def queryKeys(self) -> Any:
        ...

    def reset(self) -> bool:
        ...

    def serialize(self) -> IHostMemory:
        ...

    def update(self, key: Any, value: Any) -> bool:
        ...
class LayerInformationFormat(Enum):
    JSON: ClassVar[LayerInformationFormat]
    ONELINE: ClassVar[LayerInformationFormat]
class LayerType(Enum):
    ACTIVATION: ClassVar[LayerType]
    ASSERTION: ClassVar[LayerType]
    CAST: ClassVar[LayerType]
    CONCATENATION: ClassVar[LayerType]
    CONDITION: ClassVar[LayerType]
    CONDITIONAL_INPUT: ClassVar[LayerType]
    CONDITIONAL_OUTPUT: ClassVar[LayerType]
    CONSTANT: ClassVar[LayerType]
    CONVOLUTION: ClassVar[LayerType]
    CUMULATIVE: ClassVar[LayerType]
    DECONVOLUTION: ClassVar[LayerType]
    DEQUANTIZE: ClassVar[LayerType]
    DYNAMIC_QUANTIZE: ClassVar[LayerType]
    EINSUM: ClassVar[LayerType]
    ELEMENTWISE: ClassVar[LayerType]
    FILL: ClassVar[LayerType]
    GATHER: ClassVar[LayerType]
    GRID_SAMPLE: ClassVar[LayerType]
    IDENTITY: ClassVar[LayerType]
    ITERATOR: ClassVar[LayerType]
    LOOP_OUTPUT: ClassVar[LayerType]
    LRN: ClassVar[LayerType]
    MATRIX_MULTIPLY: ClassVar[LayerType]
    NMS: ClassVar[LayerType]
    NON_ZERO: ClassVar[LayerType]
    NORMALIZATION: ClassVar[LayerType]
    ONE_HOT: ClassVar[LayerType]
    PADDING: ClassVar[LayerType]
    PARAMETRIC_RELU: ClassVar[LayerType]
    PLUGIN: ClassVar[LayerType]
    PLUGIN_V2: ClassVar[LayerType]
    PLUGIN_V3: ClassVar[LayerType]
    POOLING: ClassVar[LayerType]
    QUANTIZE: ClassVar[LayerType]
    RAGGED_SOFTMAX: ClassVar[LayerType]
    RECURRENCE: ClassVar[LayerType]
    REDUCE: ClassVar[LayerType]
    RESIZE: ClassVar[LayerType]
    REVERSE_SEQUENCE: ClassVar[LayerType]
    SCALE: ClassVar[LayerType]
    SCATTER: ClassVar[LayerType]
    SELECT: ClassVar[LayerType]
    SHAPE: ClassVar[LayerType]
    SHUFFLE: ClassVar[LayerType]
    SLICE: ClassVar[LayerType]
    SOFTMAX: ClassVar[LayerType]
    SQUEEZE: ClassVar[LayerType]
    TOPK: ClassVar[LayerType]
    TRIP_LIMIT: ClassVar[LayerType]
    UNARY: ClassVar[LayerType]
    UNSQUEEZE: ClassVar[LayerType]
class Logger(ILogger):

    class Severity(Enum):
        ERROR: ClassVar[ILogger.Severity]
        INFO: ClassVar[ILogger.Severity]
        INTERNAL_ERROR: ClassVar[ILogger.Severity]
        VERBOSE: ClassVar[ILogger.Severity]
        WARNING: ClassVar[ILogger.Severity]
    ERROR: ClassVar[ILogger.Severity]
    INFO: ClassVar[ILogger.Severity]
    INTERNAL_ERROR: ClassVar[ILogger.Severity]
    VERBOSE: ClassVar[ILogger.Severity]
    WARNING: ClassVar[ILogger.Severity]
    min_severity: ILogger.Severity

    def __init__(self, min_severity: ILogger.Severity=...) -> None:
        ...

    def log(self, severity: ILogger.Severity, msg: str) -> None:
        ...
class MemoryPoolType(Enum):
    DLA_GLOBAL_DRAM: ClassVar[MemoryPoolType]
    DLA_LOCAL_DRAM: ClassVar[MemoryPoolType]
    DLA_MANAGED_SRAM: ClassVar[MemoryPoolType]
    TACTIC_DRAM: ClassVar[MemoryPoolType]
    TACTIC_SHARED_MEMORY: ClassVar[MemoryPoolType]
    WORKSPACE: ClassVar[MemoryPoolType]
class NetworkDefinitionCreationFlag(Enum):
    EXPLICIT_BATCH: ClassVar[NetworkDefinitionCreationFlag]
    PREFER_AOT_PYTHON_PLUGINS: ClassVar[NetworkDefinitionCreationFlag]
    PREFER_JIT_PYTHON_PLUGINS: ClassVar[NetworkDefinitionCreationFlag]
    STRONGLY_TYPED: ClassVar[NetworkDefinitionCreationFlag]
class OnnxParser:
    flags: int

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        ...

    def clear_errors(self) -> None:
        ...

    def clear_flag(self, flag: Any) -> None:
        ...

    def get_error(self, index: int) -> Any:
        ...

    def get_flag(self, flag: Any) -> bool:
        ...

    def get_layer_output_tensor(self, name: str, i: int) -> ITensor:
        ...

    def get_subgraph_nodes(self, index: int) -> list:
        ...

    def get_used_vc_plugin_libraries(self) -> list[str]:
        ...

    def is_subgraph_supported(self, index: int) -> bool:
        ...

    def load_initializer(self, name: str, data: int, size: int) -> bool:
        ...

    def load_model_proto(self, model: Any, path: str=None) -> bool:
        ...

    def parse(self, model: Any, path: str=None) -> bool:
        ...

    def parse_from_file(self, model: str) -> bool:
        ...

    def parse_model_proto(self) -> bool:
        ...

    def parse_with_weight_descriptors(self, model: Any) -> bool:
        ...

    def set_flag(self, flag: Any) -> None:
        ...

    def supports_model(self, model: Any, path: str=None) -> tuple[bool, list[tuple[list[int], bool]]]:
        ...

    def supports_model_v2(self, model: Any, path: str=None) -> bool:
        ...

    def supports_operator(self, op_name: str) -> bool:
        ...

    @property
    def num_errors(self) -> int:
        ...

    @property
    def num_subgraphs(self) -> int:
        ...
class OnnxParserFlag(Enum):
    ENABLE_UINT8_AND_ASYMMETRIC_QUANTIZATION_DLA: ClassVar[OnnxParserFlag]
    NATIVE_INSTANCENORM: ClassVar[OnnxParserFlag]
class OnnxParserRefitter:

    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        ...

    def clear_errors(self) -> None:
        ...

    def get_error(self, index: int) -> ParserError:
        ...

    def load_initializer(self, name: str, data: int, size: int) -> bool:
        ...

    def load_model_proto(self, model: Any, path: str=None) -> bool:
        ...

    def refit_from_bytes(self, model: Any, path: str=None) -> bool:
        ...

    def refit_from_file(self, model: str) -> bool:
        ...

    def refit_model_proto(self) -> bool:
        ...

    @property
    def num_errors(self) -> int:
        ...
class ParserError:

    def code(self) -> Any:
        ...

    def desc(self) -> str:
        ...

    def file(self) -> str:
        ...

    def func(self) -> str:
        ...

    def line(self) -> int:
        ...

    def local_function_stack(self) -> list[str]:
        ...

    def local_function_stack_size(self) -> int:
        ...

    def node(self) -> int:
        ...

    def node_name(self) -> str:
        ...

    def node_operator(self) -> str:
        ...
class PreviewFeature(Enum):
    ALIASED_PLUGIN_IO_10_03: ClassVar[PreviewFeature]
    PROFILE_SHARING_0806: ClassVar[PreviewFeature]
    RUNTIME_ACTIVATION_RESIZE_10_10: ClassVar[PreviewFeature]
class Profiler(IProfiler):

    def __init__(self) -> None:
        ...

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        ...
class ProfilingVerbosity(Enum):
    DETAILED: ClassVar[ProfilingVerbosity]
    LAYER_NAMES_ONLY: ClassVar[ProfilingVerbosity]
    NONE: ClassVar[ProfilingVerbosity]
class Refitter:
    error_recorder: Any
    max_threads: int
    weights_validation: bool

    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        ...

    def get_all(self) -> tuple[list[str], list[WeightsRole]]:
        ...

    def get_all_weights(self) -> list[str]:
        ...

    def get_dynamic_range(self, tensor_name: str) -> tuple:
        ...

    def get_missing(self) -> tuple[list[str], list[WeightsRole]]:
        ...

    def get_missing_weights(self) -> list[str]:
        ...

    def get_named_weights(self, weights_name: str) -> Weights:
        ...

    def get_tensors_with_dynamic_range(self) -> list[str]:
        ...

    def get_weights_location(self, weights_name: str) -> TensorLocation:
        ...

    def get_weights_prototype(self, weights_name: str) -> Weights:
        ...

    def refit_cuda_engine(self) -> bool:
        ...

    def refit_cuda_engine_async(self, stream_handle: int) -> bool:
        ...

    def set_dynamic_range(self, tensor_name: str, range: list[float]) -> bool:
        ...

    @overload
    def set_named_weights(self, name: str, weights: Union[Weights, numpy.ndarray[Any, Any]]) -> bool:
        ...

    @overload
    def set_named_weights(self, name: str, weights: Union[Weights, numpy.ndarray[Any, Any]], location: TensorLocation) -> bool:
        ...

    def set_weights(self, layer_name: str, role: WeightsRole, weights: Union[Weights, numpy.ndarray[Any, Any]]) -> bool:
        ...

    def unset_named_weights(self, weights_name: str) -> bool:
        ...

    @property
    def logger(self) -> ILogger:
        ...
class Runtime:
    DLA_core: int
    engine_host_code_allowed: bool
    error_recorder: Any
    max_threads: int
    tempfile_control_flags: int
    temporary_directory: str

    def __init__(self, logger: ILogger) -> None:
        ...

    @overload
    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine:
        ...

    @overload
    def deserialize_cuda_engine(self, stream_reader: Any) -> ICudaEngine:
        ...

    @overload
    def deserialize_cuda_engine(self, stream_reader_v2: Any) -> ICudaEngine:
        ...

    def get_plugin_registry(self) -> Any:
        ...

    def load_runtime(self, path: str) -> Runtime:
        ...

    @property
    def logger(self) -> ILogger:
        ...

    @property
    def num_DLA_cores(self) -> int:
        ...
class RuntimePlatform(Enum):
    SAME_AS_BUILD: ClassVar[RuntimePlatform]
    WINDOWS_AMD64: ClassVar[RuntimePlatform]
class SerializationFlag(Enum):
    EXCLUDE_LEAN_RUNTIME: ClassVar[SerializationFlag]
    EXCLUDE_WEIGHTS: ClassVar[SerializationFlag]
class TacticSource(Enum):
    CUBLAS: ClassVar[TacticSource]
    CUBLAS_LT: ClassVar[TacticSource]
    CUDNN: ClassVar[TacticSource]
    EDGE_MASK_CONVOLUTIONS: ClassVar[TacticSource]
    JIT_CONVOLUTIONS: ClassVar[TacticSource]
class TempfileControlFlag(Enum):
    ALLOW_IN_MEMORY_FILES: ClassVar[TempfileControlFlag]
    ALLOW_TEMPORARY_FILES: ClassVar[TempfileControlFlag]
class TensorFormat(Enum):
    CDHW32: ClassVar[TensorFormat]
    CHW16: ClassVar[TensorFormat]
    CHW2: ClassVar[TensorFormat]
    CHW32: ClassVar[TensorFormat]
    CHW4: ClassVar[TensorFormat]
    DHWC: ClassVar[TensorFormat]
    DHWC8: ClassVar[TensorFormat]
    DLA_HWC4: ClassVar[TensorFormat]
    DLA_LINEAR: ClassVar[TensorFormat]
    HWC: ClassVar[TensorFormat]
    HWC16: ClassVar[TensorFormat]
    HWC8: ClassVar[TensorFormat]
    LINEAR: ClassVar[TensorFormat]
class TensorIOMode(Enum):
    INPUT: ClassVar[TensorIOMode]
    NONE: ClassVar[TensorIOMode]
    OUTPUT: ClassVar[TensorIOMode]
class TensorLocation(Enum):
    DEVICE: ClassVar[TensorLocation]
    HOST: ClassVar[TensorLocation]
class TilingOptimizationLevel(Enum):
    FAST: ClassVar[TilingOptimizationLevel]
    FULL: ClassVar[TilingOptimizationLevel]
    MODERATE: ClassVar[TilingOptimizationLevel]
    NONE: ClassVar[TilingOptimizationLevel]
class Weights:

    @overload
    def __init__(self, type: DataType=...) -> None:
        ...

    @overload
    def __init__(self, type: DataType, ptr: int, count: int) -> None:
        ...

    @overload
    def __init__(self, a: Any) -> None:
        ...

    def __len__(self) -> int:
        ...

    def numpy(self) -> Any:
        ...

    @property
    def dtype(self) -> DataType:
        ...

    @property
    def nbytes(self) -> int:
        ...

    @property
    def size(self) -> int:
        ...
class WeightsRole(Enum):
    ANY: ClassVar[WeightsRole]
    BIAS: ClassVar[WeightsRole]
    CONSTANT: ClassVar[WeightsRole]
    KERNEL: ClassVar[WeightsRole]
    SCALE: ClassVar[WeightsRole]
    SHIFT: ClassVar[WeightsRole]
bfloat16: DataType
e8m0: DataType
float16: DataType
float32: DataType
fp4: DataType
fp8: DataType
int32: DataType
int4: DataType
int64: DataType
int8: DataType
uint8: DataType
def get_nv_onnx_parser_version() -> int:
    ...
def init_libnvinfer_plugins(logger: Any, namespace: str) -> bool:
    ...
def nptype(trt_type) -> Any:
    ...
def volume(iterable) -> Any:
    ...
