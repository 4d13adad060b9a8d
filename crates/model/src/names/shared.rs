//! Names that are looked up once. A forecast opens the weights of one model dozens of times; of 70,000 tensors the rules
//! take half a second each time.

use std::sync::{Arc, Mutex, PoisonError};

use mlx_format::checkpoint::{Checkpoint, Config};

use super::Named;
use crate::SourceError;

/// The names of one checkpoint, once somebody has asked for them.
#[derive(Debug, Default)]
pub struct SharedNames(Mutex<Option<(Config, Arc<Named>)>>);

impl SharedNames {
    /// The names of `checkpoint`, always the same one, by `config`: looked up again only where another config is asked for.
    ///
    /// # Errors
    /// As [`Named::read`].
    pub fn of(&self, checkpoint: &Checkpoint, config: &Config) -> Result<Arc<Named>, SourceError> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, named)) = held.as_ref().filter(|(own, _)| own == config) {
            return Ok(named.clone());
        }
        let named = Arc::new(Named::read(checkpoint, config)?);
        *held = Some((config.clone(), named.clone()));
        Ok(named)
    }
}
