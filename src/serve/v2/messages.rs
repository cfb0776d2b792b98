//! Messages of the protocol's gRPC package `inference`, as `inference.proto` has them. The numbers are the protocol's.
//!
//! Source: the Open Inference Protocol's and Triton's `grpc_service.proto`; tests hold both files to `tritonclient`.

use std::collections::HashMap;

use prost::{Message, Oneof};

macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $kind:ty = [$($prost:tt)*],)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, PartialEq, Message)]
            pub(super) struct $name {
                $($(#[$field_doc])* #[prost($($prost)*)] pub(super) $field: $kind,)*
            }
        )*
    };
}

/// A parameter's value.
#[derive(Clone, PartialEq, Oneof)]
pub(super) enum Choice {
    #[prost(bool, tag = "1")]
    Bool(bool),
    #[prost(int64, tag = "2")]
    Int64(i64),
    #[prost(string, tag = "3")]
    String(String),
    #[prost(double, tag = "4")]
    Double(f64),
    #[prost(uint64, tag = "5")]
    Uint64(u64),
}

pub(super) type Parameters = HashMap<String, Parameter>;

messages! {
    Empty {}
    Live { live: bool = [bool, tag = "1"], }
    Ready { ready: bool = [bool, tag = "1"], }
    ModelRequest { name: String = [string, tag = "1"], version: String = [string, tag = "2"], }
    ServerMetadata {
        name: String = [string, tag = "1"],
        version: String = [string, tag = "2"],
        extensions: Vec<String> = [string, repeated, tag = "3"],
    }
    TensorMetadata {
        name: String = [string, tag = "1"],
        datatype: String = [string, tag = "2"],
        shape: Vec<i64> = [int64, repeated, tag = "3"],
    }
    ModelMetadata {
        name: String = [string, tag = "1"],
        versions: Vec<String> = [string, repeated, tag = "2"],
        platform: String = [string, tag = "3"],
        inputs: Vec<TensorMetadata> = [message, repeated, tag = "4"],
        outputs: Vec<TensorMetadata> = [message, repeated, tag = "5"],
    }
    Parameter { choice: Option<Choice> = [oneof = "Choice", tags = "1, 2, 3, 4, 5"], }
    /// Of the typed contents only those that this server's inputs and outputs have.
    Contents {
        bools: Vec<bool> = [bool, repeated, tag = "1"],
        fp32: Vec<f32> = [float, repeated, tag = "6"],
        bytes: Vec<bytes::Bytes> = [bytes = "bytes", repeated, tag = "8"],
    }
    InputTensor {
        name: String = [string, tag = "1"],
        datatype: String = [string, tag = "2"],
        shape: Vec<i64> = [int64, repeated, tag = "3"],
        parameters: Parameters = [map = "string, message", tag = "4"],
        contents: Option<Contents> = [message, optional, tag = "5"],
    }
    RequestedOutput {
        name: String = [string, tag = "1"],
        parameters: Parameters = [map = "string, message", tag = "2"],
    }
    InferRequest {
        model_name: String = [string, tag = "1"],
        model_version: String = [string, tag = "2"],
        id: String = [string, tag = "3"],
        parameters: Parameters = [map = "string, message", tag = "4"],
        inputs: Vec<InputTensor> = [message, repeated, tag = "5"],
        outputs: Vec<RequestedOutput> = [message, repeated, tag = "6"],
        raw_input_contents: Vec<bytes::Bytes> = [bytes = "bytes", repeated, tag = "7"],
    }
    OutputTensor {
        name: String = [string, tag = "1"],
        datatype: String = [string, tag = "2"],
        shape: Vec<i64> = [int64, repeated, tag = "3"],
        parameters: Parameters = [map = "string, message", tag = "4"],
    }
    InferResponse {
        model_name: String = [string, tag = "1"],
        model_version: String = [string, tag = "2"],
        id: String = [string, tag = "3"],
        parameters: Parameters = [map = "string, message", tag = "4"],
        outputs: Vec<OutputTensor> = [message, repeated, tag = "5"],
        raw_output_contents: Vec<bytes::Bytes> = [bytes = "bytes", repeated, tag = "6"],
    }
    ModelInput {
        name: String = [string, tag = "1"],
        data_type: i32 = [int32, tag = "2"],
        dims: Vec<i64> = [int64, repeated, tag = "4"],
        optional: bool = [bool, tag = "8"],
    }
    ModelOutput {
        name: String = [string, tag = "1"],
        data_type: i32 = [int32, tag = "2"],
        dims: Vec<i64> = [int64, repeated, tag = "3"],
    }
    /// The part of Triton's model configuration that its clients read.
    ModelConfig {
        name: String = [string, tag = "1"],
        platform: String = [string, tag = "2"],
        max_batch_size: i32 = [int32, tag = "4"],
        input: Vec<ModelInput> = [message, repeated, tag = "5"],
        output: Vec<ModelOutput> = [message, repeated, tag = "6"],
        backend: String = [string, tag = "17"],
    }
    ModelConfigResponse { config: Option<ModelConfig> = [message, optional, tag = "1"], }
    Duration { count: u64 = [uint64, tag = "1"], ns: u64 = [uint64, tag = "2"], }
    InferStatistics {
        success: Option<Duration> = [message, optional, tag = "1"],
        fail: Option<Duration> = [message, optional, tag = "2"],
        queue: Option<Duration> = [message, optional, tag = "3"],
        compute_input: Option<Duration> = [message, optional, tag = "4"],
        compute_infer: Option<Duration> = [message, optional, tag = "5"],
        compute_output: Option<Duration> = [message, optional, tag = "6"],
        cache_hit: Option<Duration> = [message, optional, tag = "7"],
        cache_miss: Option<Duration> = [message, optional, tag = "8"],
    }
    BatchStatistics {
        batch_size: u64 = [uint64, tag = "1"],
        compute_input: Option<Duration> = [message, optional, tag = "2"],
        compute_infer: Option<Duration> = [message, optional, tag = "3"],
        compute_output: Option<Duration> = [message, optional, tag = "4"],
    }
    ModelStatistics {
        name: String = [string, tag = "1"],
        version: String = [string, tag = "2"],
        last_inference: u64 = [uint64, tag = "3"],
        inference_count: u64 = [uint64, tag = "4"],
        execution_count: u64 = [uint64, tag = "5"],
        inference_stats: Option<InferStatistics> = [message, optional, tag = "6"],
        batch_stats: Vec<BatchStatistics> = [message, repeated, tag = "7"],
    }
    Statistics { model_stats: Vec<ModelStatistics> = [message, repeated, tag = "1"], }
    IndexRequest { repository_name: String = [string, tag = "1"], ready: bool = [bool, tag = "2"], }
    IndexEntry {
        name: String = [string, tag = "1"],
        version: String = [string, tag = "2"],
        state: String = [string, tag = "3"],
        reason: String = [string, tag = "4"],
    }
    Index { models: Vec<IndexEntry> = [message, repeated, tag = "1"], }
    /// Load and unload.
    ControlRequest {
        repository_name: String = [string, tag = "1"],
        model_name: String = [string, tag = "2"],
        /// Names only; uploads are refused.
        parameters: HashMap<String, Empty> = [map = "string, message", tag = "3"],
    }
}
