//! The classifier's tensors, in the forms in which long-tailed recognition saves them, as one matrix and one bias.

use ndarray::Array2;

use super::super::FoldError;
use super::builder::Builder;
use super::overrides::{COSINE_SCALE, ClassifierForm, SQUASHED_SCALE};

/// Added to nothing: the least length that PyTorch's `normalize` divides by.
const LEAST_LENGTH: f64 = 1e-12;

/// A classifier: logits = weight · x + bias, of features or of their direction.
pub(super) struct Weights {
    /// [classes, features].
    pub(super) weight: Array2<f64>,
    /// One for each class.
    pub(super) bias: Vec<f64>,
    /// Of a cosine, whether the direction's length is ‖x‖/(1 + ‖x‖) instead of 1.
    pub(super) squashed: Option<bool>,
    /// What it is taken for, in words.
    pub(super) assumed: String,
}

impl Builder<'_> {
    /// The classifier `name`, which takes `features` features.
    pub(super) fn classifier(&self, name: &str, features: usize) -> Result<Weights, FoldError> {
        let key = |part: &str| format!("{name}.{part}");
        let has_bias = self.has(&key("bias"));
        let mut weight = self.matrix(name, features)?;
        let [a, b] = [weight.nrows(), weight.ncols()];
        let given = self.overrides().classifier;
        // NormedLinear keeps its weight as [features, classes].
        let asked = matches!(given, Some(ClassifierForm::NormedLinear { .. })) && a == features;
        let turned = asked || (a == features && b != features && !has_bias);
        if turned {
            weight = weight.reversed_axes();
        }
        let classes = weight.nrows();
        let shape = self.checkpoint().tensors.get(&key("weight")).or(self.checkpoint().tensors.get(&key("weight_v")));
        if let Some(tensor) = shape.filter(|_| weight.ncols() != features || classes < 2) {
            let expected = format!("[classes, {features}] with at least 2 classes");
            let key = if self.has(&key("weight")) { key("weight") } else { key("weight_v") };
            return Err(self.unfit(&key, tensor, expected));
        }
        let mut bias = if has_bias { self.vector(&key("bias"), classes)? } else { vec![0.0; classes] };
        let form = given.unwrap_or(match () {
            () if turned => ClassifierForm::Cosine { scale: COSINE_SCALE },
            () if self.checkpoint().is_cosine => ClassifierForm::SquashedCosine { scale: SQUASHED_SCALE },
            () => ClassifierForm::Linear,
        });
        let mut squashed = None;
        if let ClassifierForm::Cosine { scale }
        | ClassifierForm::NormedLinear { scale }
        | ClassifierForm::SquashedCosine { scale } = form
        {
            for mut row in weight.rows_mut() {
                let length = row.iter().map(|w| w * w).sum::<f64>().sqrt().max(LEAST_LENGTH);
                row.iter_mut().for_each(|w| *w *= scale / length);
            }
            // A layer that was made linear may keep a bias that its cosine does not add.
            bias.fill(0.0);
            squashed = Some(matches!(form, ClassifierForm::SquashedCosine { .. }));
        }
        let mut assumed = match form {
            ClassifierForm::Linear if has_bias => "a linear classifier of the features as they are".to_owned(),
            ClassifierForm::Linear => {
                "a linear classifier of the features as they are, without bias, not a cosine".to_owned()
            }
            form if has_bias => format!("a classifier {form}, which adds no bias although there is one"),
            form => format!("a classifier {form}"),
        };
        if self.has(&key("scales")) {
            let scales = self.scales(&key("scales"), classes)?;
            for (mut row, scale) in weight.rows_mut().into_iter().zip(&scales) {
                row.iter_mut().for_each(|w| *w *= scale);
            }
            bias.iter_mut().zip(&scales).for_each(|(b, scale)| *b *= scale);
            assumed += ", its outputs times a factor for each class, bias included";
        }
        Ok(Weights { weight, bias, squashed, assumed })
    }

    /// Its matrix as it is stored; of a weight-normalised layer g · v/‖v‖, a row at a time (arXiv 1602.07868).
    fn matrix(&self, name: &str, features: usize) -> Result<Array2<f64>, FoldError> {
        let normalized = self.has(&format!("{name}.weight_v")) && self.has(&format!("{name}.weight_g"));
        let key = format!("{name}.{}", if normalized { "weight_v" } else { "weight" });
        let tensor = self.take(&key)?;
        let expected = || format!("[classes, {features}] with at least 2 classes");
        let [a, b] = tensor.shape[..] else { return Err(self.unfit(&key, tensor, expected())) };
        let values = tensor.values.iter().map(|&w| f64::from(w)).collect();
        let mut matrix = Array2::from_shape_vec((a, b), values).map_err(|_| self.unfit(&key, tensor, expected()))?;
        if normalized {
            let lengths = format!("{name}.weight_g");
            let stored = self.take(&lengths)?;
            if stored.shape != [a, 1] {
                return Err(self.unfit(&lengths, stored, format!("[{a}, 1]")));
            }
            for (mut row, g) in matrix.rows_mut().into_iter().zip(&stored.values) {
                let length = row.iter().map(|w| w * w).sum::<f64>().sqrt();
                row.iter_mut().for_each(|w| *w *= f64::from(*g) / length);
            }
        }
        Ok(matrix)
    }

    /// One factor for each class, [classes] or [1, classes].
    fn scales(&self, key: &str, classes: usize) -> Result<Vec<f64>, FoldError> {
        let tensor = self.take(key)?;
        if tensor.shape.iter().product::<usize>() != classes {
            return Err(self.unfit(key, tensor, format!("[{classes}] or [1, {classes}]")));
        }
        Ok(tensor.values.iter().map(|&v| f64::from(v)).collect())
    }
}
