//! Which experts a token goes to.

/// How experts are chosen by their scores.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Experts for each token.
    pub top_k: usize,
    /// Only the best groups of experts take part.
    pub groups: Option<Groups>,
}

/// Experts in groups of one size (arXiv 2412.19437, section 2.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Number of groups.
    pub count: usize,
    /// Number of groups that take part.
    pub keep: usize,
    /// A group is judged by the sum of its two best experts, not by its best one.
    pub best_two: bool,
}

impl Selection {
    /// The `top_k` best of a token's scores, best first; of equal ones the first.
    pub fn choose(&self, scores: &[f32]) -> Vec<u32> {
        let mut allowed = vec![true; scores.len()];
        if let Some(groups) = &self.groups {
            let size = scores.len() / groups.count.max(1);
            let judged: Vec<f32> = scores
                .chunks_exact(size.max(1))
                .map(|group| {
                    let best = best(group, if groups.best_two { 2 } else { 1 });
                    best.iter().map(|&index| group[index as usize]).sum()
                })
                .collect();
            let kept = best(&judged, groups.keep);
            for (index, allowed) in allowed.iter_mut().enumerate() {
                *allowed = kept.contains(&((index / size.max(1)) as u32));
            }
        }
        let masked: Vec<f32> = scores
            .iter()
            .zip(allowed)
            .map(|(&score, allowed)| if allowed { score } else { f32::NEG_INFINITY })
            .collect();
        best(&masked, self.top_k)
    }
}

/// Indices of the `count` largest, largest first; of equal ones the first.
fn best(values: &[f32], count: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..values.len() as u32).collect();
    order.sort_by(|&a, &b| values[b as usize].total_cmp(&values[a as usize]));
    order.truncate(count);
    order
}
