// Questions to the server: one of a kind under way at a time, and of those that wait only the newest.

export async function model() {
  const answer = await fetch("/api/model");
  if (!answer.ok) throw new Error(await told(answer));
  return answer.json();
}

async function told(answer) {
  try {
    return (await answer.json()).error;
  } catch {
    return `the server answers with ${answer.status}`;
  }
}

export class Line {
  // `found(result, question)` is called with each answer, `failed(message)` with each error ("" when it is over).
  constructor(path, found, failed) {
    Object.assign(this, { path, found, failed, next: null, busy: false, forgotten: 0 });
  }

  ask(question) {
    this.next = question;
    if (!this.busy) this.#work();
  }

  forget() {
    // Also the answer that is still to come.
    this.next = null;
    this.forgotten += 1;
  }

  async #work() {
    this.busy = true;
    while (this.next) {
      const question = this.next;
      this.next = null;
      const forgotten = this.forgotten;
      try {
        const answer = await fetch(this.path + (question.query ?? ""), {
          method: "POST",
          headers: { "content-type": question.type ?? "application/json" },
          body: question.body instanceof Blob || ArrayBuffer.isView(question.body) ? question.body : JSON.stringify(question.body),
        });
        if (answer.status === 503) {
          await new Promise((resolve) => setTimeout(resolve, 1000));
          if (this.forgotten === forgotten) this.next ??= question;
        } else if (!answer.ok) {
          const message = await told(answer);
          if (this.forgotten === forgotten) this.failed(message);
        } else {
          const result = await answer.json();
          if (this.forgotten === forgotten) {
            this.failed("");
            this.found(result, question);
          }
        }
      } catch (error) {
        if (!(error instanceof TypeError)) {
          this.busy = false;
          throw error;
        }
        this.failed("The server does not answer. Is it still running?");
      }
    }
    this.busy = false;
  }
}
