//! The two halves on threads of their own: pictures are prepared while the network runs on others.

use std::time::Duration;

use bytes::Bytes;
use ndarray::ArrayView4;

use super::prepare::{Prepare, StageTimes, add};
use super::{ClassifyError, Input, Network, Prediction, predict};
use crate::pixels::{TensorBatch, TensorLength};
use crate::runtime::{HostMemory, RuntimeError};
use crate::stop::Stop;

/// Prepares one picture after another.
pub struct Preparer {
    prepare: Box<dyn Prepare>,
}

/// A picture as the network takes it: prepared, or sent so.
pub struct Ready {
    values: Values,
    times: StageTimes,
}

enum Values {
    Prepared(TensorBatch),
    Sent(Bytes),
}

impl Ready {
    /// A picture that was sent as its tensor of this shape: f32 in little-endian bytes.
    ///
    /// # Errors
    /// When it is not exactly one tensor.
    pub fn sent(bytes: Bytes, shape: [usize; 3]) -> Result<Self, TensorLength> {
        let expected = 4 * shape.iter().product::<usize>();
        if bytes.len() != expected {
            return Err(TensorLength { found: bytes.len(), expected });
        }
        Ok(Self { values: Values::Sent(bytes), times: StageTimes::default() })
    }

    /// Its memory, without what was in it, for another picture.
    pub fn emptied(self) -> Option<TensorBatch> {
        let Values::Prepared(mut tensor) = self.values else { return None };
        tensor.clear();
        Some(tensor)
    }
}

impl Preparer {
    /// A preparer that decodes and preprocesses with `prepare`.
    pub fn new(prepare: Box<dyn Prepare>) -> Self {
        Self { prepare }
    }

    /// Prepares a picture as long as its `stop` is not asked for, in the memory of an earlier one where there is some.
    ///
    /// # Errors
    /// When the picture cannot be decoded or is of another size.
    pub fn prepare(&mut self, input: &Input, stop: &Stop, memory: Option<TensorBatch>) -> Result<Ready, ClassifyError> {
        let mut tensor = memory.unwrap_or_else(|| TensorBatch::new(self.prepare.shape()));
        tensor.clear();
        let times = add(&*self.prepare, &mut tensor, input, stop)?;
        Ok(Ready { values: Values::Prepared(tensor), times })
    }
}

/// Runs the network on pictures that others have prepared: they are loaded one by one, then run together.
pub struct Executor {
    network: Network,
    /// What a run reads: of the size of the largest batch, used again and again.
    memory: HostMemory,
    /// What the pictures that are loaded have cost.
    loaded: Vec<StageTimes>,
}

/// What became of a batch.
pub struct Executed {
    /// The answers, in order, of the pictures that were run.
    pub outcomes: Vec<Result<Prediction, ClassifyError>>,
    /// Why there are not more of them: the device was lost.
    pub lost: Option<RuntimeError>,
}

impl Executor {
    /// An executor of `network`, which runs batches between two of its sizes filled up to the larger.
    pub fn new(network: Network) -> Self {
        let network = network.filling_up();
        let memory = network.host_memory(network.max_batch() * network.shape().iter().product::<usize>());
        Self { network, memory, loaded: Vec::new() }
    }

    /// The most pictures in one run of the network.
    pub fn max_batch(&self) -> usize {
        self.network.max_batch()
    }

    /// The shape of one picture.
    pub fn shape(&self) -> [usize; 3] {
        self.network.shape()
    }

    /// Pictures that are loaded.
    pub fn loaded(&self) -> usize {
        self.loaded.len()
    }

    /// Forgets what is loaded.
    pub fn clear(&mut self) {
        self.loaded.clear();
    }

    /// Loads one more picture, up to [`Self::max_batch`].
    ///
    /// # Errors
    /// When it is of another size; then it is not loaded.
    pub fn load(&mut self, ready: &Ready) -> Result<(), TensorLength> {
        let (at, item) = (self.loaded.len(), self.item());
        let place = self.memory.get_mut(at * item..(at + 1) * item).unwrap_or_default();
        match &ready.values {
            Values::Prepared(tensor) => tensor.copy_first(place)?,
            Values::Sent(bytes) => {
                let (values, _) = bytes.as_chunks::<4>();
                if values.len() != place.len() {
                    return Err(TensorLength { found: bytes.len(), expected: 4 * place.len() });
                }
                place.iter_mut().zip(values).for_each(|(place, value)| *place = f32::from_le_bytes(*value));
            }
        }
        self.loaded.push(ready.times);
        Ok(())
    }

    /// A picture that is loaded, to be given to another executor.
    ///
    /// # Errors
    /// When no picture of this number is loaded.
    pub fn unload(&self, at: usize) -> Result<Ready, TensorLength> {
        let item = self.item();
        let values = self.memory.get(at * item..(at + 1) * item).unwrap_or_default();
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut ready = Ready::sent(bytes.into(), self.shape())?;
        ready.times = self.loaded.get(at).copied().unwrap_or_default();
        Ok(ready)
    }

    /// Classifies the pictures that are loaded, until `stop` is asked for; `waited` is how long each has.
    pub fn execute(&mut self, waited: &[Duration], stop: &Stop) -> Executed {
        let ([a, b, c], item, held) = (self.shape(), self.item(), self.loaded.len());
        let filled_up = self.network.filled_up(held);
        // What follows the pictures may be of an earlier batch.
        self.memory.get_mut(held * item..filled_up * item).unwrap_or_default().fill(0.0);
        let values = self.memory.get(..filled_up * item).unwrap_or_default();
        let (ran, lost) = match ArrayView4::from_shape((filled_up, a, b, c), values) {
            Ok(view) if held > 0 => self.network.run_all(view, held, stop),
            _ => (Vec::new(), None),
        };
        let with_costs = self.loaded.iter().zip(waited).zip(ran);
        let mut outcomes: Vec<_> = with_costs.map(|((times, waited), ran)| predict(ran, *times, *waited)).collect();
        if lost.is_none() {
            outcomes.resize_with(held, || Err(RuntimeError::Stopped.into()));
        }
        Executed { outcomes, lost }
    }

    fn item(&self) -> usize {
        self.shape().iter().product()
    }
}
