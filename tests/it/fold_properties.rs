//! Folded equals unfolded on random graphs: groups, strides, one channel, zero and tiny variances, zero biases.

use nbn::fold::graph::{BatchNorm, NodeId, Op};
use nbn::fold::{Graph, fold, verify};
use ndarray::{Array2, Array4};

use crate::support::library;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn pick(&mut self, options: &[usize]) -> usize {
        options[self.next() as usize % options.len()]
    }

    fn value(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    fn values(&mut self, length: usize) -> Vec<f64> {
        (0..length).map(|_| self.value()).collect()
    }

    fn norm(&mut self, channels: usize) -> Op {
        let variance = (0..channels)
            .map(|_| match self.next() % 4 {
                0 => 1e-3 * (1.0 + 0.01 * self.value()),
                1 => 0.0,
                _ => 0.5 + self.value().abs(),
            })
            .collect::<Vec<f64>>();
        // As a trained network has it: a channel that hardly varies has a small weight.
        let weight = variance.iter().map(|v| (self.value() + 1.5) * (v + 1e-5).sqrt()).collect();
        let bias = if self.next().is_multiple_of(4) { vec![0.0; channels] } else { self.values(channels) };
        let norm = BatchNorm { weight, bias, mean: self.values(channels), variance };
        match self.next() % 3 {
            0 => Op::NormalizedBatchNorm { alpha: 3.0 * self.value(), directions: norm },
            _ => Op::BatchNorm(norm),
        }
    }

    fn conv(&mut self, channels: usize, out: usize, groups: usize, kernel: usize, stride: usize) -> Op {
        let shape = (out, channels / groups, kernel, kernel);
        let fan_in = (channels / groups * kernel * kernel) as f64;
        let values = (0..shape.0 * shape.1 * kernel * kernel).map(|_| (self.value() / fan_in.sqrt()) as f32).collect();
        let bias = self.next().is_multiple_of(2).then(|| self.values(out));
        Op::Conv { weight: Array4::from_shape_vec(shape, values).unwrap(), bias, stride, padding: kernel / 2, groups }
    }

    fn graph(&mut self) -> Graph {
        let side = self.pick(&[9, 16, 21]);
        let mut graph = Graph::new(side);
        let (mut x, mut channels): (NodeId, usize) = (0, 3);
        for layer in 0..3 {
            let groups = if channels.is_multiple_of(4) { self.pick(&[1, 2, 4]) } else { 1 };
            let out = if groups == 1 { self.pick(&[1, 4, 8, 12]) } else { self.pick(&[4, 8, 12]) };
            let (kernel, stride) = (self.pick(&[1, 3]), self.pick(&[1, 2]));
            let op = self.conv(channels, out, groups, kernel, stride);
            let y = graph.push(format!("conv{layer}"), op, &[x]);
            let norm = self.norm(out);
            let y = graph.push(format!("norm{layer}"), norm, &[y]);
            let shortcut = if out >= channels && self.next().is_multiple_of(2) {
                let added = out - channels;
                let op = Op::SubsamplePad { stride, before: added / 2, after: added - added / 2 };
                graph.push(format!("shortcut{layer}"), op, &[x])
            } else {
                let op = self.conv(channels, out, 1, 1, stride);
                let z = graph.push(format!("projection{layer}"), op, &[x]);
                let norm = self.norm(out);
                graph.push(format!("projection_norm{layer}"), norm, &[z])
            };
            let sum = graph.push(format!("add{layer}"), Op::Add, &[y, shortcut]);
            x = graph.push(format!("relu{layer}"), Op::Relu, &[sum]);
            channels = out;
        }
        x = graph.push("pool", Op::GlobalAveragePool, &[x]);
        let experts: Vec<NodeId> = (0..self.pick(&[1, 2, 3]))
            .map(|e| {
                let weight = Array2::from_shape_vec((5, channels), self.values(5 * channels)).unwrap();
                let bias = self.values(5);
                let logits = graph.push(format!("fc{e}"), Op::Gemm { weight, bias }, &[x]);
                let norm = BatchNorm {
                    weight: vec![1.0; 5],
                    bias: self.values(5),
                    mean: self.values(5),
                    variance: vec![0.2; 5],
                };
                graph.push(format!("lr{e}"), Op::BatchNorm(norm), &[logits])
            })
            .collect();
        let logits = graph.push("mean", Op::Mean, &experts);
        graph.outputs.push(("logits".into(), logits));
        graph
    }
}

#[test]
fn folding_random_graphs_changes_nothing() {
    for seed in 0..60 {
        let mut random = Random(seed);
        let graph = random.graph();
        let folded = fold(&graph).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        verify::prove(&graph, &folded.encode(), library()).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    }
}

#[test]
fn the_proof_refuses_a_network_that_is_not_the_checkpoints() {
    let mut random = Random(7);
    let graph = random.graph();
    let mut other = graph.clone();
    let logits = other.nodes.iter_mut().rev().find_map(|n| match &mut n.op {
        Op::Gemm { bias, .. } => Some(bias),
        _ => None,
    });
    logits.unwrap()[0] += 0.01;
    let model = fold(&other).unwrap().encode();
    assert!(verify::prove(&graph, &model, library()).unwrap_err().to_string().contains("proof failed"));
}
