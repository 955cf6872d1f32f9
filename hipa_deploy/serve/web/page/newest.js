// Only the newest request counts: an older one is aborted, and its answer never shown.

/**
 * Runs one task at a time.
 *
 * `run(order, signal)` does the work; `done(order, result)` and `failed(order, error)` hear of the
 * newest order alone.
 */
export class Newest {
  constructor({ run, done, failed, busy }) {
    this.run = run;
    this.done = done;
    this.failed = failed;
    this.busy = busy;
    this.number = 0;
    this.timer = null;
    this.abort = null;
  }

  /** Replace whatever waits or runs by an order, after a delay in milliseconds. */
  request(order, delay = 0) {
    this.stop();
    const number = this.number;
    this.timer = setTimeout(() => this.#start(order, number), delay);
  }

  /** Forget what waits, and abort what runs. */
  stop() {
    this.number += 1;
    clearTimeout(this.timer);
    this.timer = null;
    this.abort?.abort();
    this.abort = null;
    this.busy(false);
  }

  /** Whether something waits or runs. */
  get active() {
    return this.timer !== null;
  }

  async #start(order, number) {
    const abort = new AbortController();
    this.abort = abort;
    this.busy(true);
    let result = null;
    let problem = null;
    try {
      result = await this.run(order, abort.signal);
    } catch (error) {
      problem = error;
    }
    // A newer order has come meanwhile: this answer is stale, whatever it is.
    if (number !== this.number) return;
    this.timer = null;
    this.abort = null;
    this.busy(false);
    if (problem) this.failed(order, problem);
    else this.done(order, result);
  }
}
